"""Prompts: the ids of `apply_chat_template`, and text of users never becomes a control token."""

from __future__ import annotations

import datetime
import itertools
import os
from pathlib import Path

import pytest

from deepseek_optimizer.chat.template import ChatTemplate
from deepseek_optimizer.errors import RequestError
from support.chat_templates import deepseek_r1, llama3, qwen
from support.tiny_v3 import tiny_v3

MAKERS = {"qwen": qwen, "deepseek_r1": deepseek_r1, "llama3": llama3}
LOOP = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
SYSTEMS = ["You are a helpful assistant.", "  spaces around \n\n", "系统提示 🏔️", "the"]
SAYINGS = [
    "Hello",
    "hello  world\n\n\tx",
    " leading",
    "trailing  ",
    "深度学习 naïve café",
    "👩‍👩‍👧 🇫🇷",
    "a < b > c <| |> <",
    "{{ x }} {% y %}",
    "\\n \"quoted\" 'it'",
    "def f():\n    return 1\n",
    "<b>bold</b> [INST] <unk?>",
    "1234567890",
    "क्षत्रिय \u202eabc\u202c \ufeff \x00 e\u0301",
]
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "now",
            "description": "the time",
            "parameters": {"type": "object", "properties": {"tz": {"type": "string"}}},
        },
    }
]


@pytest.fixture(scope="module")
def made():
    """name, prefix -> (tokenizer, template), each created once and closed."""
    result: dict = {}

    def get(name, prefix=False):
        if (name, prefix) not in result:
            tokenizer = MAKERS[name](prefix=prefix)
            result[name, prefix] = tokenizer, ChatTemplate(tokenizer)
        return result[name, prefix]

    yield get
    for _, template in result.values():
        template.close()


def conversations():
    for i, (a, b) in enumerate(itertools.pairwise(SAYINGS + SAYINGS[:1])):
        turns = [{"role": "user", "content": a}, {"role": "assistant", "content": b}, {"role": "user", "content": a + b}]
        yield turns if i % 3 else [{"role": "system", "content": SYSTEMS[i % len(SYSTEMS)]}, *turns]


def plain(tokenizer, messages, **kwargs):
    return tokenizer.apply_chat_template(messages, return_dict=False, **{"add_generation_prompt": True, **kwargs})


@pytest.mark.parametrize("prefix", [False, True])
@pytest.mark.parametrize("name", MAKERS)
def test_ordinary_text_gives_the_ids_of_transformers(made, name, prefix):
    tokenizer, template = made(name, prefix)
    for messages in conversations():
        prompt = template.render(messages)
        assert prompt.ids == plain(tokenizer, messages), messages
        assert prompt.text == plain(tokenizer, messages, tokenize=False)


def test_ordinary_text_gives_the_ids_of_transformers_with_a_real_tokenizer():
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_v3())
    template = ChatTemplate(tokenizer)
    try:
        for messages in conversations():
            assert template.render(messages).ids == plain(tokenizer, messages)
    finally:
        template.close()


@pytest.mark.parametrize("prefix", [False, True])
@pytest.mark.parametrize("name", MAKERS)
def test_control_tokens_in_messages_are_text(made, name, prefix):
    tokenizer, template = made(name, prefix)
    control = [str(token) for token in tokenizer.added_tokens_encoder if len(token) > 4 and not token.startswith("<0x")]
    harmless = [
        {"role": "system", "content": "S"},
        {"role": "user", "content": "U"},
        {"role": "assistant", "content": "A"},
        {"role": "user", "content": "V"},
    ]
    ids = {tokenizer.convert_tokens_to_ids(token) for token in control}
    expected = [i for i in template.render(harmless).ids if i in ids]
    for token in control:
        for content in (token, f"a {token}\n{token}b", token * 3, f"{token[:2]}{token}{token[2:]}"):
            for place in (0, 1, 3):
                messages = [dict(message) for message in harmless]
                messages[place]["content"] = content
                prompt = template.render(messages)
                assert [i for i in prompt.ids if i in ids] == expected, (token, content, place)
                if not prefix:
                    assert content.strip() in tokenizer.decode(prompt.ids)
                assert content.strip() in prompt.text


def test_joined_messages_form_no_control_tokens():
    tokenizer = deepseek_r1()
    template = ChatTemplate(tokenizer)
    try:
        user = tokenizer.convert_tokens_to_ids("<｜User｜>")
        messages = [
            {"role": "system", "content": "<｜Us"},
            {"role": "system", "content": "er｜>"},
            {"role": "user", "content": "x"},
        ]
        assert template.render(messages).ids.count(user) == 1
        tokenizer.chat_template = "{% for m in messages %}<{{ m.content }}>{% endfor %}"
        assert tokenizer.convert_tokens_to_ids("<think>") not in template.render([{"role": "user", "content": "think"}]).ids
        tokenizer.chat_template = "{{ tools | tojson(ensure_ascii=True) }}{{ messages[0].content | replace('<think>', '') }}"
        actual = template.render([{"role": "user", "content": "<｜tool▁sep｜> <th<think>ink>"}], tools=TOOLS)
        assert not {tokenizer.convert_tokens_to_ids(token) for token in ("<think>", "<｜tool▁sep｜>")} & set(actual.ids)
    finally:
        template.close()


def test_control_tokens_in_tools_names_and_options_are_text(made):
    tokenizer, template = made("qwen")
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    tools = [
        {
            "type": "function",
            "function": {
                "name": "f",
                "description": "<|im_end|>",
                "parameters": {"type": "object", "properties": {"<|im_end|>": {"enum": ["<|im_end|>"]}}},
            },
        }
    ]
    calls = [{"id": "<|im_end|>", "type": "function", "function": {"name": "f", "arguments": '{"<|im_end|>": "<|im_end|>"}'}}]
    messages = [
        {"role": "user", "content": "x"},
        {"role": "assistant", "content": None, "tool_calls": calls},
        {"role": "tool", "tool_call_id": "<|im_end|>", "content": "<|im_end|>"},
    ]
    prompt = template.render(messages, tools=tools)
    assert prompt.ids.count(end) == 4 and prompt.text.count("<|im_end|>") == 10


def test_templates_may_transform_the_content(made):
    _, template = made("deepseek_r1")
    messages = [
        {"role": "user", "content": "x"},
        {"role": "assistant", "content": "<think>secret</think>shown"},
        {"role": "user", "content": "y"},
    ]
    assert "secret" not in (text := template.render(messages).text) and "shown" in text
    _, template = made("llama3")
    assert "\n\nhi<|eot_id|>" in template.render([{"role": "user", "content": "  hi \n"}]).text


def test_call_arguments_have_the_form_that_the_template_expects(made):
    calls = [{"id": "c", "type": "function", "function": {"name": "now", "arguments": '{"tz":  "é"}'}}]
    messages = [
        {"role": "user", "content": "x"},
        {"role": "assistant", "content": "", "tool_calls": calls},
        {"role": "tool", "tool_call_id": "c", "content": "12"},
    ]
    for name in ("qwen", "deepseek_r1"):
        assert '{"tz": "é"}' in made(name)[1].render(messages).text


def test_tools_are_rendered_by_the_template(made):
    tokenizer, template = made("qwen")
    messages = [{"role": "system", "content": "S"}, {"role": "user", "content": "x"}]
    assert template.render(messages, tools=TOOLS).ids == plain(tokenizer, messages, tools=TOOLS)
    assert template.knows_tools() and not made("llama3")[1].knows_tools()
    with pytest.raises(RequestError, match="tools: .*does not support tools"):
        made("llama3")[1].render(messages, tools=TOOLS)


def test_only_options_of_the_template_are_accepted(made):
    tokenizer, template = made("qwen")
    messages = [{"role": "user", "content": "x"}]
    assert "enable_thinking" in template.variables() and not template.variables() & {"messages", "tools", "bos_token"}
    quiet = template.render(messages, options={"enable_thinking": False})
    assert quiet.ids == plain(tokenizer, messages, enable_thinking=False) and quiet.text.endswith("</think>\n\n")
    for options in (
        {"thinking": True},
        {"messages": []},
        {"bos_token": "x"},
        {"chat_template": "x"},
        {"tools": []},
        {"self": 1},
    ):
        with pytest.raises(RequestError, match="has no such option"):
            template.render(messages, options=options)


def test_the_last_message_can_be_continued(made):
    tokenizer, template = made("qwen")
    messages = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "The answer"}]
    want = plain(tokenizer, messages, add_generation_prompt=False, continue_final_message=True)
    prompt = template.render(messages, continue_final=True)
    assert prompt.ids == want and prompt.text.endswith("The answer")
    with pytest.raises(RequestError, match="last message"):
        template.render(messages[:1], continue_final=True)


@pytest.mark.parametrize(
    ("name", "tools", "ends"),
    [
        ("qwen", None, "Be kind.<|im_end|>"),
        ("qwen", TOOLS, "</tool_call><|im_end|>"),
        ("llama3", None, "Be kind.<|eot_id|>"),
        ("deepseek_r1", None, "Be kind."),
    ],
)
def test_where_the_system_message_ends(made, name, tools, ends):
    tokenizer, template = made(name)
    messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Be kind."}]
    prompt = template.render(messages, tools=tools)
    begin, end = prompt.system
    assert begin == 0 and tokenizer.decode(prompt.ids[:end]).endswith(ends)
    assert "Be kind." in tokenizer.decode(prompt.ids[end:])
    assert template.render(messages[1:]).system is None


BAD = [
    None,
    "hello",
    [],
    [{}],
    [None],
    ["x"],
    {"role": "user"},
    [{"role": "user"}],
    [{"role": "user", "content": None}],
    [{"role": "user", "content": 5}],
    [{"role": "root", "content": "x"}],
    [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://localhost/x"}}]}],
    [{"role": "user", "content": [{"type": "text"}]}],
    [{"role": "user", "content": "\ud800"}],
    [{"role": "user", "content": [5]}],
    [{"role": "user", "content": "x", "tool_calls": [{}]}],
    [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}],
    [{"role": "assistant", "tool_calls": [{"function": {"name": "<think>", "arguments": "{}"}}]}],
    [{"role": "assistant", "tool_calls": 3}],
    [{"role": "user", "content": "x", "name": "a b"}],
    [{"role": ["user"], "content": "x"}],
]


@pytest.mark.parametrize("messages", BAD, ids=range(len(BAD)))
def test_invalid_messages_are_rejected(made, messages):
    with pytest.raises(RequestError):
        made("qwen")[1].render(messages)


def test_invalid_tools_are_rejected(made):
    deep: dict = {}
    for _ in range(10_000):
        deep = {"properties": {"a": deep}}
    one = TOOLS[0]["function"]
    for tools in (
        "x",
        [5],
        [{}],
        [{"type": "function", "function": {"name": "a b"}}],
        [{"type": "function", "function": {**one, "parameters": deep}}],
        TOOLS * 2,
        TOOLS * 300,
        [{"type": "retrieval"}],
    ):
        with pytest.raises(RequestError, match="tools"):
            made("qwen")[1].render([{"role": "user", "content": "x"}], tools=tools)


def test_developer_and_parts_and_unknown_fields(made):
    _, template = made("qwen")
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    messages = [{"role": "developer", "content": "D"}, {"role": "user", "content": parts, "refusal": None, "x": object()}]
    assert template.render(messages).text.startswith("<|im_start|>system\nD<|im_end|>\n<|im_start|>user\na\nb<|im_end|>")


@pytest.mark.parametrize("unit", ["\u0301", "<", "<|im_start|>x", " "])
def test_a_megabyte_of_anything_ends(made, unit):
    text = unit * ((1 << 20) // len(unit))
    prompt = made("qwen")[1].render([{"role": "user", "content": text}])
    assert text in prompt.text


@pytest.fixture
def hostile(byte_tokenizer):
    made = []

    def get(source, **limits):
        class Tokenizer:
            chat_template = source

            def __getattr__(self, name):
                return getattr(byte_tokenizer, name)

            def __call__(self, *args, **kwargs):
                return byte_tokenizer(*args, **kwargs)

            def get_chat_template(self, *_):
                return source

        made.append(ChatTemplate(Tokenizer(), **{"seconds": 0.5, "memory": 1 << 28, **limits}))
        return made[-1]

    yield get
    for template in made:
        template.close()


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (LOOP, "too long"),
        ("{% for i in range(10**9) %}x{% endfor %}", "Range too big"),
        ("{{ 9**9**9 * 'x' | length }}{{ 9 ** (9 ** 9) }}", "too long"),
        ("{{ 'a' * 10**10 }}", "too much memory"),
        (
            "{% set ns = namespace(x='ab') %}{% for i in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
            "too much memory|too long",
        ),
        ("{{ 'a' * 30000000 }}", "rendered text is too long|it takes too long"),  # on a slow machine
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{% if %}", "TemplateSyntaxError"),
        ("{{ messages.nothing.at.all }}", "Undefined"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "SecurityError|Undefined"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError|nested too deeply"),
        ("{{ cycler.__init__.__globals__.os.system('touch /tmp/escaped') }}", "SecurityError|Undefined"),
        ("", "prompt is empty"),
        ("{{ '\\ud800' }}", "half of a surrogate pair"),
        ("{% for a in [1] %}" * 30 + "x" + "{% endfor %}" * 30, "too many statically nested blocks"),
        ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "RecursionError|nested too deeply"),
        ("{{ '%999999999d' % 1 }}", "too much memory"),
    ],
)
def test_malicious_templates_fail_only_the_request(hostile, source, message):
    template = hostile(source)
    with pytest.raises(RequestError, match=message) as caught:
        template.render([{"role": "user", "content": "x"}])
    assert "/" not in str(caught.value).replace("/v1/", "")
    assert not Path("/tmp/escaped").exists()


@pytest.mark.parametrize("name", MAKERS)
def test_text_around_a_long_document(made, name):
    tokenizer, template = made(name)
    before, after = template.around("Read this.\n\n", "\n\nWhat is <|im_end|> and <｜User｜>?")
    text = "Some text."
    whole = template.render([{"role": "user", "content": f"Read this.\n\n{text}\n\nWhat is <|im_end|> and <｜User｜>?"}])
    assert before.text + text + after.text == whole.text
    inner = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode([*before.ids, *inner, *after.ids]) == tokenizer.decode(whole.ids)
    special = set(tokenizer.all_special_ids)
    assert [i for i in (*before.ids, *after.ids) if i in special] == [i for i in whole.ids if i in special]


def test_around_needs_a_template_that_renders_a_message_once(hostile):
    for source in ("{{ messages[0].content }}{{ messages[0].content }}", "Hello", "{{ messages[0].content[:10] }}"):
        with pytest.raises(RequestError, match="unchanged and once"):
            hostile(source).around("", "x")


def test_a_killed_template_worker_is_replaced(hostile):
    template = hostile("{% if messages[0].content == 'loop' %}" + LOOP + "{% endif %}ok")
    for _ in range(2):
        with pytest.raises(RequestError, match="too long"):
            template.render([{"role": "user", "content": "loop"}])
        assert template.render([{"role": "user", "content": "x"}]).text == "ok"


def test_a_model_without_a_template(byte_tokenizer):
    import copy

    tokenizer = copy.deepcopy(byte_tokenizer)
    tokenizer.chat_template = None
    with pytest.raises(RequestError, match="no chat template; use /v1/completions"):
        ChatTemplate(tokenizer).render([{"role": "user", "content": "x"}])


def test_no_process_remains(made):
    template = ChatTemplate(made("qwen")[0])
    template.render([{"role": "user", "content": "x"}])
    pid = template._worker.pid
    template.close()
    template.close()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    with pytest.raises(RequestError, match="closed"):
        template.render([{"role": "user", "content": "x"}])


TURNS = [
    {"role": "system", "content": "the system"},
    {"role": "user", "content": "hello <|im_start|>"},
    {"role": "assistant", "content": "  the fox \n"},
    {"role": "user", "content": "again"},
    {"role": "assistant", "content": "<b>the dog"},
]


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("prefix", [False, True])
def test_rendering_reports_the_positions_of_answers(made, name, prefix):
    tokenizer, template = made(name, prefix)
    dialogue = template.dialogue(TURNS)
    whole = template.render(TURNS, add_generation_prompt=False)
    assert (dialogue.ids, dialogue.text, dialogue.hidden) == (whole.ids, whole.text, [])
    message = [tokenizer.decode(dialogue.ids[begin:end]).strip() for begin, end in dialogue.answers]
    assert len(message) == 2 and "the fox" in message[0] and message[1].startswith("<b>the dog")
    for begin, end in dialogue.answers:
        assert dialogue.ids[begin:end].index(tokenizer.eos_token_id) == end - begin - 1
        # the prompt ends where the answer begins, except for reasoning
        requested = template.render(TURNS[: 2 if end < dialogue.answers[1][0] else 4]).ids
        assert dialogue.ids[:begin] == requested[:begin]


def test_messages_omitted_by_a_template_are_detected(made):
    _, template = made("deepseek_r1")
    thought = {"role": "assistant", "content": "the fox", "reasoning_content": "who jumps"}
    assert template.dialogue([TURNS[1], thought]).hidden == [1]
    assert not template.marks_answers()


def test_user_text_has_no_control_tokens(made):
    tokenizer, template = made("qwen")
    ids = template.said("the <|im_start|> fox")
    assert tokenizer.decode(ids) == "the <|im_start|> fox" and tokenizer.convert_tokens_to_ids("<|im_start|>") not in ids


def test_a_template_that_requires_the_date_and_functions_gets_them():
    """Firefunction's; Transformers fails on it. A template that only asks for the date is rendered as by Transformers."""
    tokenizer = qwen()
    today = datetime.date.today().strftime("%b %d %Y")
    for source, expected in (
        ("{{ 'Today is ' + datetime + functions.strip() }}{{ messages[0].content }}", f"Today is {today}hi"),
        ("{% if datetime is defined %}{{ datetime }}{% endif %}{{ messages[0].content }}", "hi"),
    ):
        tokenizer.chat_template = source
        template = ChatTemplate(tokenizer)
        try:
            assert template.render([{"role": "user", "content": "hi"}]).text == expected
        finally:
            template.close()
