"""/v1/messages: Anthropic's requests, content blocks, events and errors."""

from __future__ import annotations

import copy
import json

import pytest

from deepseek_optimizer.server.protocol.anthropic.requests import MessagesRequest
from deepseek_optimizer.server.protocol.anthropic.to_chat import chat_request
from deepseek_optimizer.server.protocol.base import parse
from support.chats import HERMES, THINKING
from support.fake_engine import FakeEngine
from support.live_server import LiveServer

PATH = "/v1/messages"
USER = [{"role": "user", "content": "weather in Rom?"}]
WEATHER = {
    "name": "weather",
    "description": "Of a city",
    "input_schema": {"type": "object", "properties": {"city": {"enum": ["Rom", "Köln"]}}, "required": ["city"]},
}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Rom"}}\n</tool_call>'


@pytest.fixture(scope="module")
def server(byte_tokenizer, grammars):
    """Answers with a tool call if there are tools and no result yet."""
    tokenizer = copy.deepcopy(byte_tokenizer)
    tokenizer.chat_template = HERMES

    def script(request):
        prompt = tokenizer.decode(request.prompt)
        return f"I look.\n{CALL}" if "<tools>" in prompt and "sunny" not in prompt else "It is sunny. END of it"

    with LiveServer(FakeEngine(tokenizer, script=script), grammars=grammars) as live:
        yield live


@pytest.fixture(scope="module")
def thinker(byte_tokenizer):
    tokenizer = copy.deepcopy(byte_tokenizer)
    tokenizer.chat_template = THINKING
    with LiveServer(FakeEngine(tokenizer, script=lambda request: "<think>\nhm, well\n</think>\n\nfine")) as live:
        yield live


def ask(live, status=200, **body):
    response = live.client.post(PATH, json={"max_tokens": 200, "messages": USER, **body})
    assert response.status_code == status, response.text
    return response.json()


def events(live, **body) -> list[dict]:
    response = live.client.post(PATH, json={"max_tokens": 200, "messages": USER, "stream": True, **body})
    assert response.status_code == 200 and response.headers["content-type"].startswith("text/event-stream")
    result = []
    for block in response.text.split("\n\n")[:-1]:
        name, data = block.split("\n")
        result.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {result[-1]['type']}"
    return result


def assembled(stream: list[dict]) -> dict:
    """The message that a stream of events adds up to, as Anthropic's client assembles it."""
    message = stream[0]["message"]
    for event in stream[1:]:
        if event["type"] == "content_block_start":
            assert event["index"] == len(message["content"])
            message["content"].append({**event["content_block"], "json": ""})
        elif event["type"] == "content_block_delta":
            block, delta = message["content"][event["index"]], event["delta"]
            if delta["type"] == "input_json_delta":
                block["json"] += delta["partial_json"]
            else:
                name = delta["type"].removesuffix("_delta")
                block[name] += delta[name]
        elif event["type"] == "message_delta":
            message |= event["delta"]
            message["usage"] |= event["usage"]
    for block in message["content"]:
        text = block.pop("json")
        if block["type"] == "tool_use":
            block["input"] = json.loads(text)
    return message


def same(stream: list[dict], whole: dict) -> bool:
    message = assembled(stream)
    for one in (message, whole):
        one.pop("id")
        for block in one["content"]:
            block.pop("id", None)
    return message == whole


def test_a_text(server):
    whole = ask(server, system="Be brief")
    assert whole["type"] == "message" and whole["role"] == "assistant" and whole["id"].startswith("msg_")
    assert whole["content"] == [{"type": "text", "text": "It is sunny. END of it"}]
    assert (whole["stop_reason"], whole["stop_sequence"]) == ("end_turn", None)
    assert set(whole["usage"]) == {
        "input_tokens", "cache_creation_input_tokens", "cache_read_input_tokens", "output_tokens"
    }  # fmt: skip
    stream = events(server, system="Be brief")
    kinds = [event["type"] for event in stream]
    assert kinds[:3] == ["message_start", "ping", "content_block_start"]
    assert kinds[-3:] == ["content_block_stop", "message_delta", "message_stop"]
    assert stream[0]["message"]["content"] == [] and stream[0]["message"]["usage"]["input_tokens"] > 5
    assert same(stream, whole)


def test_a_tool_call_and_its_result(server):
    whole = ask(server, tools=[WEATHER])
    assert [block["type"] for block in whole["content"]] == ["text", "tool_use"] and whole["stop_reason"] == "tool_use"
    call = dict(whole["content"][1])
    assert call["name"] == "weather" and call["input"] == {"city": "Rom"}
    messages = [
        *USER,
        {"role": "assistant", "content": whole["content"]},
        {
            "role": "user",
            "content": [{"type": "tool_result", "tool_use_id": call["id"], "content": [{"type": "text", "text": "sunny"}]}],
        },
    ]
    answer = ask(server, tools=[WEATHER], messages=messages)
    assert answer["content"][0]["text"].startswith("It is sunny")
    assert same(events(server, tools=[WEATHER]), whole)


@pytest.mark.parametrize("choice", [{"type": "any"}, {"type": "tool", "name": "weather", "disable_parallel_tool_use": True}])
def test_forced_tools(server, choice):
    messages = [{"role": "user", "content": "sunny"}]  # the script would not call a tool
    whole = ask(server, tools=[WEATHER], tool_choice=choice, messages=messages)
    call = whole["content"][0]
    assert call["type"] == "tool_use" and call["input"]["city"] in ("Rom", "Köln")


def test_no_tools(server):
    assert ask(server, tools=[WEATHER], tool_choice={"type": "none"})["content"][0]["text"].startswith("It is")


def test_why_an_answer_ended(server):
    stopped = ask(server, stop_sequences=["END"])
    assert (stopped["stop_reason"], stopped["stop_sequence"]) == ("stop_sequence", "END")
    assert stopped["content"][0]["text"] == "It is sunny. "
    assert ask(server, max_tokens=3)["stop_reason"] == "max_tokens"


def test_reasoning(thinker):
    whole = ask(thinker, thinking={"type": "enabled", "budget_tokens": 1024})
    thought, text = whole["content"]
    assert thought["thinking"] == "hm, well" and thought["signature"] and text == {"type": "text", "text": "fine"}
    stream = events(thinker, thinking={"type": "adaptive"})
    assert "signature_delta" in [event["delta"]["type"] for event in stream if event["type"] == "content_block_delta"]
    assert same(stream, whole)
    omitted = ask(thinker, thinking={"type": "enabled", "budget_tokens": 1024, "display": "omitted"})["content"]
    assert omitted[0]["thinking"] == "" and omitted[0]["signature"] and len(omitted) == 2
    messages = [*USER, {"role": "assistant", "content": whole["content"]}, {"role": "user", "content": "and now?"}]
    assert ask(thinker, messages=messages)["content"][-1]["text"] == "fine"


def test_reasoning_that_is_disabled(thinker):
    assert ask(thinker, thinking={"type": "disabled"})["content"] == [{"type": "text", "text": "fine"}]
    assert thinker.engine.tokenizer.decode(thinker.engine.seen[-1].prompt).endswith("<think></think>")


def test_counting_tokens(server):
    body = {"messages": USER, "system": "Be brief", "tools": [WEATHER]}
    count = server.client.post(f"{PATH}/count_tokens", json=body).json()
    usage = ask(server, **body)["usage"]
    assert count == {"input_tokens": usage["input_tokens"] + usage["cache_read_input_tokens"]}


@pytest.mark.parametrize(
    "body,words",
    [
        (
            {"messages": [{"role": "user", "content": [{"type": "image", "source": {"type": "url", "url": "http://x"}}]}]},
            "reads text only",
        ),
        ({"messages": [{"role": "user", "content": [{"type": "document", "source": {}}]}]}, "document"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "custom"),
        ({"tool_choice": {"type": "any"}}, "tool_choice"),
        ({"tool_choice": {"type": "tool", "name": "f"}, "tools": [WEATHER]}, "tool_choice"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": None}, "max_tokens"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "narrator", "content": "x"}]}, "role"),
        ({"thinking": {"type": "sometimes"}}, "thinking"),
    ],
)
def test_errors(server, body, words):
    error = ask(server, 400, **body)
    assert error["type"] == "error" and error["error"]["type"] == "invalid_request_error" and words in error["error"]["message"]


def test_the_beginning_of_an_answer_is_continued(server):
    ask(server, messages=[*USER, {"role": "assistant", "content": "It is"}])
    assert server.engine.tokenizer.decode(server.engine.seen[-1].prompt).endswith("<|assistant|>It is")


def test_another_model(server):
    assert ask(server, 404, model="claude")["error"]["type"] == "not_found_error"


def test_a_failure_in_the_middle_is_an_event(make_server):
    live = make_server(step_seconds=0.02, script=lambda request: "x" * 3000)
    with live.client.stream("POST", PATH, json={"max_tokens": 3000, "messages": USER, "stream": True}) as response:
        lines = response.iter_lines()
        while "text_delta" not in next(lines):
            pass
        live.call(live.engine.fail)
        rest = [json.loads(line[6:]) for line in lines if line.startswith("data: ")]
    assert rest[-1]["type"] == "error" and rest[-1]["error"]["type"] == "api_error" and "secret" not in json.dumps(rest)


def converted(**body) -> list[dict]:
    chat = chat_request(parse(MessagesRequest, {"max_tokens": 1, "messages": USER, **body}), True)
    return [message.model_dump(exclude_none=True) for message in chat.messages]


def test_messages_become_those_of_a_chat():
    cached = {"type": "ephemeral"}
    system = [{"type": "text", "text": "x-anthropic-billing-header: cc_version=2; cch=0d1"},
              {"type": "text", "text": "You code", "cache_control": cached}, {"type": "text", "text": "well"}]  # fmt: skip
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "user", "content": "c"},
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "hm", "signature": "s"},
                {"type": "redacted_thinking", "data": "zzz"},
                {"type": "text", "text": "I look"},
                {"type": "tool_use", "id": "t1", "name": "f", "input": {"x": 1}},
                {"type": "tool_use", "id": "t2", "name": "g", "input": {}},
            ],
        },
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": "t1", "content": "1", "is_error": True},
                {"type": "tool_result", "tool_use_id": "t2", "cache_control": cached},
                {"type": "text", "text": "go on"},
            ],
        },
    ]
    call = lambda id, name, text: {"id": id, "type": "function", "function": {"name": name, "arguments": text}}  # noqa: E731
    assert converted(system=system, messages=messages) == [
        {"role": "system", "content": "You code\nwell"},
        {"role": "user", "content": "a\nb\nc"},
        {
            "role": "assistant",
            "content": "I look",
            "reasoning_content": "hm",
            "tool_calls": [call("t1", "f", '{"x":1}'), call("t2", "g", "{}")],
        },
        {"role": "tool", "tool_call_id": "t1", "content": "1"},
        {"role": "tool", "tool_call_id": "t2", "content": ""},
        {"role": "user", "content": "go on"},
    ]


@pytest.mark.parametrize(
    "fields,effort",
    [
        ({}, None),
        ({"thinking": {"type": "disabled"}}, "none"),
        ({"thinking": {"type": "adaptive"}}, None),
        ({"thinking": {"type": "adaptive"}, "output_config": {"effort": "max"}}, "max"),
        ({"thinking": {"type": "enabled", "budget_tokens": 1024}}, "low"),
        ({"thinking": {"type": "enabled", "budget_tokens": 10_000}}, "medium"),
        ({"thinking": {"type": "enabled", "budget_tokens": 32_000}}, "high"),
    ],
)
def test_the_effort_of_reasoning(fields, effort):
    body = parse(MessagesRequest, {"max_tokens": 1, "messages": USER, **fields})
    assert chat_request(body, True).reasoning_effort == effort
    if effort == "none":
        assert chat_request(body, False).reasoning_effort is None


def test_structured_output(server):
    schema = {"type": "object", "properties": {"n": {"enum": [7]}}, "required": ["n"], "additionalProperties": False}
    whole = ask(server, output_config={"format": {"type": "json_schema", "schema": schema}})
    assert json.loads(whole["content"][0]["text"]) == {"n": 7}
