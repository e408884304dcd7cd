"""Tools: on templates without them, restricted by tool_choice, cut off, and together with a response format and reasoning."""

from __future__ import annotations

import copy
import json

import pytest

from deepseek_optimizer.server.settings import ServerSettings
from support.chats import HERMES, WEATHER
from support.fake_engine import FakeEngine
from support.live_server import LiveServer, assert_error

PATH = "/v1/chat/completions"
USER = {"role": "user", "content": "weather?"}
NOW = {"type": "function", "function": {"name": "now"}}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Rom"}}\n</tool_call>'
NO_SYSTEM = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
    "[{{ m.role }}]{{ m.content }}{% endfor %}[assistant]"
)
PLAIN = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}[assistant]"
HARMONY = (
    "{% for m in messages %}<|start|>{{ m.role }}<|message|>{{ m.content }}<|end|>{% endfor %}"
    "{% if tools %}functions{% endif %}<|start|>assistant{# <|channel|>analysis #}"
)


@pytest.fixture(scope="module")
def serve(byte_tokenizer, grammars):
    """serve(template, settings, special tokens) -> a server of a model with that template, whose script is `live.script`."""
    running = {}

    def start(template, settings=None, special=()):
        key = template, settings.tools_format if settings else None, special
        if key not in running:
            tokenizer = copy.deepcopy(byte_tokenizer)
            if special:
                tokenizer.add_special_tokens({"additional_special_tokens": list(special)}, replace_extra_special_tokens=False)
            tokenizer.chat_template = template
            engine = FakeEngine(tokenizer, script=lambda request: live.script)
            running[key] = live = LiveServer(engine, settings, grammars=None if special else grammars)
            live.__enter__()
        return running[key]

    yield start
    for live in running.values():
        live.__exit__()


def ask(live, **body):
    result = live.client.post(PATH, json={"messages": [USER], "tools": [WEATHER], **body})
    assert result.status_code == 200, result.text
    choice = result.json()["choices"][0]
    streamed = live.client.post(PATH, json={"messages": [USER], "tools": [WEATHER], **body, "stream": True}).text
    deltas = [json.loads(event[6:])["choices"][0]["delta"] for event in streamed.split("\n\n")[:-2]]
    assert "".join(delta.get("content") or "" for delta in deltas) == (choice["message"]["content"] or "")
    calls = [call for delta in deltas for call in delta.get("tool_calls", ())]
    whole = choice["message"].get("tool_calls", [])
    for index, call in enumerate(whole):
        parts = [part for part in calls if part["index"] == index]
        assert parts[0]["function"] == {"name": call["function"]["name"], "arguments": ""} and "id" in parts[0]
        assert "".join(part["function"]["arguments"] for part in parts) == call["function"]["arguments"]
    assert {call["index"] for call in calls} == set(range(len(whole)))
    return choice


def prompt_of(live):
    return live.engine.tokenizer.decode(live.engine.seen[-1].prompt)


def names_of(choice):
    return [call["function"]["name"] for call in choice["message"].get("tool_calls", ())]


@pytest.fixture
def plain(serve):
    live = serve(PLAIN)
    live.script = f"I look.\n{CALL}"
    return live


@pytest.fixture
def hermes(serve):
    """A function that sets the script of the server."""

    def start(script):
        live = serve(HERMES)
        live.script = script
        return live

    return start


def test_tools_are_described_to_a_template_without_tools(plain):
    choice = ask(plain)
    assert choice["message"]["content"] == "I look." and names_of(choice) == ["weather"]
    assert json.loads(choice["message"]["tool_calls"][0]["function"]["arguments"]) == {"city": "Rom"}
    assert choice["finish_reason"] == "tool_calls"
    prompt = prompt_of(plain)
    assert prompt.startswith("[system]# Tools") and '"name": "weather"' in prompt and "<tool_call>" in prompt
    assert prompt.endswith("[user]weather?[assistant]")
    ask(plain, messages=[{"role": "system", "content": "Be kind."}, USER])
    assert prompt_of(plain).startswith("[system]Be kind.\n\n# Tools")
    ask(plain, tool_choice="none")
    assert prompt_of(plain) == "[user]weather?[assistant]"


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}])
def test_required_calls_on_a_template_without_tools(plain, choice):
    actual = ask(plain, tool_choice=choice, parallel_tool_calls=False, max_tokens=200)
    assert names_of(actual) == ["weather"] and actual["message"]["content"] is None


def test_results_are_user_messages(serve):
    live = serve(NO_SYSTEM)
    live.script = "It is sunny."
    call = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Rom"}'}}
    result = {"role": "tool", "tool_call_id": "call_1", "content": "sunny"}
    history = [USER, {"role": "assistant", "content": None, "tool_calls": [call, call]}, result, result]
    assert ask(live, messages=[{"role": "system", "content": "Be kind."}, *history])["message"]["content"] == "It is sunny."
    prompt = prompt_of(live)
    assert prompt.startswith("[user]Be kind.\n\n# Tools")
    assert f"weather?[assistant]{CALL}\n{CALL}[user]<tool_response>\nsunny\n</tool_response>\n<tool_response>" in prompt
    ask(live, messages=[*history, {"role": "user", "content": "And now?"}])
    assert prompt_of(live).endswith("</tool_response>\nAnd now?[assistant]")


FORMS = ["hermes", "llama", "deepseek_v3", "glm45", "kimi_k2", "mistral"]


@pytest.mark.parametrize("name", ["qwen3_coder", *(pytest.param(name, marks=pytest.mark.slow) for name in FORMS)])
def test_every_format_works_on_any_template(serve, name):
    live = serve(PLAIN, ServerSettings(tools_format=name))
    live.script = "text"
    actual = ask(live, tool_choice="required", parallel_tool_calls=False, max_tokens=300)
    assert names_of(actual) == ["weather"]
    assert json.loads(actual["message"]["tool_calls"][0]["function"]["arguments"])["city"] in ("Rom", "Köln")
    assert "example_tool" in prompt_of(live)


def test_a_template_that_renders_calls_but_no_tools(serve):
    """As those of DeepSeek-R1 and V3.1."""
    begin, end = "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>", "<｜tool▁call▁end｜><｜tool▁calls▁end｜>"
    live = serve(
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% for c in m.tool_calls or [] %}"
        + begin
        + "{{ c.function.name }}"
        "<｜tool▁sep｜>{{ c.function.arguments }}" + end + "{% endfor %}{% endfor %}[assistant]"
    )
    live.script = f'{begin}weather<｜tool▁sep｜>{{"city": "Rom"}}{end}'
    call = {"id": "c", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Rom"}'}}
    result = {"role": "tool", "tool_call_id": "c", "content": "sunny"}
    assert names_of(ask(live, messages=[USER, {"role": "assistant", "tool_calls": [call]}, result])) == ["weather"]
    prompt = prompt_of(live)
    assert prompt.startswith("[system]# Tools") and f"{begin}example_tool<｜tool▁sep｜>" in prompt
    assert prompt.endswith(f'[assistant]{begin}weather<｜tool▁sep｜>{{"city": "Rom"}}{end}[tool]sunny[assistant]')


def test_harmony_needs_its_template(serve):
    live = serve(PLAIN, ServerSettings(tools_format="harmony"))
    assert_error(live.client.post(PATH, json={"messages": [USER], "tools": [WEATHER]}), 400, "tools")


@pytest.mark.parametrize("tokens", [1, 12, 40, 70, 100, 140])
def test_calls_that_are_cut_off_are_not_content(plain, tokens):
    """With several calls, the second one is cut off."""
    for choice in ("required", "auto"):
        actual = ask(plain, tool_choice=choice, max_tokens=tokens)
        assert "tool_call" not in (actual["message"]["content"] or "") and '"name"' not in (actual["message"]["content"] or "")
        assert actual["finish_reason"] in ("length", "tool_calls", "stop")


def allowed(mode, *names):
    tools = [{"type": "function", "function": {"name": name}} for name in names]
    return {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": tools}}


def test_allowed_tools(plain):
    both = {"tools": [WEATHER, NOW], "parallel_tool_calls": False, "max_tokens": 300}
    assert names_of(ask(plain, **both, tool_choice=allowed("required", "now"))) == ["now"]
    assert "weather" in prompt_of(plain)  # the prompt does not change
    assert names_of(ask(plain, **both, tool_choice=allowed("auto", "now"))) == ["now"]  # the model begins a call
    assert names_of(ask(plain, **both, tool_choice=allowed("auto", "weather", "now"))) == ["weather"]
    flat = [{"type": "function", **tool["function"]} for tool in (WEATHER, NOW)]
    choice = {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "now"}]}
    body = {"input": "x", "tools": flat, "tool_choice": choice, "parallel_tool_calls": False}
    actual = plain.client.post("/v1/responses", json=body).json()
    assert [item["name"] for item in actual["output"]] == ["now"] and actual["tool_choice"] == choice
    for wrong in (allowed("required", "other"), allowed("never", "now"), {"type": "allowed_tools"}, allowed("auto")):
        assert_error(plain.client.post(PATH, json={"messages": [USER], "tools": [WEATHER], "tool_choice": wrong}), 400)


def test_parallel_calls(hermes):
    live = hermes(f"{CALL}\n{CALL}")
    for choice in ("auto", "required"):
        assert names_of(ask(live, tool_choice=choice)) == ["weather", "weather"]
        assert names_of(ask(live, tool_choice=choice, parallel_tool_calls=True)) == ["weather", "weather"]
        assert names_of(ask(live, tool_choice=choice, parallel_tool_calls=False)) == ["weather"]
    assert names_of(ask(live, tool_choice={"type": "function", "function": {"name": "weather"}})) == ["weather"]


def test_required_calls_of_a_model_without_tools_are_single_by_default(plain):
    plain.script = f"{CALL}\n{CALL}"
    assert names_of(ask(plain, tool_choice="required")) == ["weather"]
    assert names_of(ask(plain, tool_choice="required", parallel_tool_calls=True)) == ["weather", "weather"]


def test_arguments_follow_the_schema_in_auto(hermes):
    live = hermes('<tool_call>\n{"name": "weather", "arguments": {"town": 5}}\n</tool_call>')
    actual = ask(live, max_tokens=200, parallel_tool_calls=False)
    assert json.loads(actual["message"]["tool_calls"][0]["function"]["arguments"])["city"] in ("Rom", "Köln")


def test_a_schema_that_cannot_be_enforced_is_loose_in_auto(hermes):
    live = hermes('<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>')
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "not": {"required": ["b"]}}}}
    assert json.loads(ask(live, tools=[tool])["message"]["tool_calls"][0]["function"]["arguments"]) == {"a": 1}
    body = {"messages": [USER], "tools": [tool], "tool_choice": "required"}
    assert_error(live.client.post(PATH, json=body), 400, "tools")


def test_tools_with_a_response_format(hermes):
    schema = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"enum": [{"a": 1}]}}}
    for script, content, names in ((CALL, None, ["weather"]), ('{"a": 1}', {"a": 1}, [])):
        live = hermes(script)
        actual = ask(live, response_format=schema, max_tokens=200)
        text = actual["message"]["content"]
        assert (text and json.loads(text)) == content and names_of(actual) == names


def test_reasoning_before_calls(serve):
    template = HERMES + "{# </think> #}"
    live = serve(template, special=("<think>", "</think>"))
    live.script = f"<think>\nhm\n</think>\n\n{CALL}"
    for choice in ("auto", "required"):
        actual = ask(live, tool_choice=choice, parallel_tool_calls=False)
        assert actual["message"]["reasoning_content"] == "hm" and names_of(actual) == ["weather"]
        assert actual["message"]["content"] is None


@pytest.fixture(scope="module")
def harmony():
    from support.chat_templates import tokenizer

    special = [
        "<|startoftext|>",
        "<|return|>",
        "<|start|>",
        "<|end|>",
        "<|channel|>",
        "<|message|>",
        "<|constrain|>",
        "<|call|>",
    ]
    made = tokenizer(HARMONY, special)
    text = (
        "<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>commentary to=functions.weather "
        '<|constrain|>json<|message|>{"city": "Rom"}'
    )
    scripts = {"text": text}
    with LiveServer(FakeEngine(made, script=lambda request: scripts["text"])) as live:
        yield live, scripts


@pytest.mark.parametrize("choice", ["auto", "required", {"type": "function", "function": {"name": "weather"}}])
def test_harmony_calls(harmony, choice):
    """The syntax consists of special tokens, which the grammar requires as tokens."""
    live, _ = harmony
    actual = ask(live, tool_choice=choice, messages=[USER])
    assert names_of(actual) == ["weather"] and actual["message"]["reasoning_content"] == "hm"
    assert json.loads(actual["message"]["tool_calls"][0]["function"]["arguments"]) == {"city": "Rom"}
    assert actual["message"]["content"] is None and actual["finish_reason"] == "tool_calls"


def test_harmony_without_tools(harmony):
    live, scripts = harmony
    before = scripts["text"]
    scripts["text"] = "<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>final<|message|>7 or so"
    try:
        for fields, content in (({}, "7 or so"), ({"guided_regex": "[0-9]"}, "7")):
            result = live.client.post(PATH, json={"messages": [USER], **fields}).json()
            message = result["choices"][0]["message"]
            assert (message["reasoning_content"], message["content"]) == ("hm", content), message
            assert result["usage"]["completion_tokens_details"]["reasoning_tokens"] > 0
    finally:
        scripts["text"] = before
