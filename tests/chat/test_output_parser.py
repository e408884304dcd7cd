"""A model's output parsed into reasoning, content and tool calls: every format, in any chunks, and malformed output."""

from __future__ import annotations

import json
import random
import re

import pytest

from deepseek_optimizer.chat.deltas import ContentDelta, Parsed, ToolCallDelta, collect
from deepseek_optimizer.chat.output_parser import make_output_parser, special_markers
from deepseek_optimizer.chat.tools import FORMATS, detect

THINKS = "...{{ content.split('</think>') }}..."
ARGUMENTS = {"city": "Zürich 🏔 <b>?", "days": [1, {"deep": None}], "quote": 'a "b" \\ }{'}
TEXT = json.dumps(ARGUMENTS, ensure_ascii=False)
WHOLE = {
    "hermes": f'<tool_call>\n{{"name": "weather", "arguments": {TEXT}}}\n</tool_call>\n'
    '<tool_call>{"arguments": {}, "name": "now"}</tool_call>',
    "deepseek_v3": "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>weather\n```json\n"
    f"{TEXT}\n```<｜tool▁call▁end｜>\n<｜tool▁call▁begin｜>function<｜tool▁sep｜>now\n```json\n{{}}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
    "deepseek_v31": f"<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>weather<｜tool▁sep｜>{TEXT}<｜tool▁call▁end｜>"
    "<｜tool▁call▁begin｜>now<｜tool▁sep｜>{}<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
    "llama": f'{{"name": "weather", "parameters": {TEXT}}}; {{"name": "now", "parameters": {{}}}}',
    "dsml": '<｜DSML｜function_calls>\n<｜DSML｜invoke name="weather">\n'
    f'<｜DSML｜parameter name="city" string="true">{ARGUMENTS["city"]}</｜DSML｜parameter>\n'
    '<｜DSML｜parameter name="days" string="false">[1, {"deep": null}]</｜DSML｜parameter>\n'
    f'<｜DSML｜parameter name="quote" string="true">{ARGUMENTS["quote"]}</｜DSML｜parameter>\n'
    '</｜DSML｜invoke>\n<｜DSML｜invoke name="now">\n</｜DSML｜invoke>\n</｜DSML｜function_calls>',
}
WHOLE |= {
    "qwen3_coder": f"<tool_call>\n<function=weather>\n<parameter=city>\n{ARGUMENTS['city']}\n</parameter>\n<parameter=days>\n"
    f'[1, {{"deep": null}}]\n</parameter>\n<parameter=quote>\n{ARGUMENTS["quote"]}\n</parameter>\n</function>\n</tool_call>\n'
    "<tool_call>\n<function=now>\n</function>\n</tool_call>",
    "seed_oss": f"<seed:tool_call>\n<function=weather>\n<parameter=city>{ARGUMENTS['city']}</parameter>\n<parameter=days>"
    f'[1, {{"deep": null}}]</parameter>\n<parameter=quote>{ARGUMENTS["quote"]}</parameter>\n</function>\n</seed:tool_call>'
    "<seed:tool_call>\n<function=now>\n</function>\n</seed:tool_call>",
    "glm45": f"<tool_call>weather\n<arg_key>city</arg_key>\n<arg_value>{ARGUMENTS['city']}</arg_value>\n"
    '<arg_key>days</arg_key>\n<arg_value>[1, {"deep": null}]</arg_value>\n'
    f"<arg_key>quote</arg_key>\n<arg_value>{ARGUMENTS['quote']}</arg_value>\n</tool_call>\n<tool_call>now\n</tool_call>",
    "glm47": f"<tool_call>weather<arg_key>city</arg_key><arg_value>{ARGUMENTS['city']}</arg_value>"
    '<arg_key>days</arg_key><arg_value>[1, {"deep": null}]</arg_value>'
    f"<arg_key>quote</arg_key><arg_value>{ARGUMENTS['quote']}</arg_value></tool_call><tool_call>now</tool_call>",
    "minimax_m2": f'<minimax:tool_call>\n<invoke name="weather">\n<parameter name="city">{ARGUMENTS["city"]}</parameter>\n'
    f'<parameter name="days">[1, {{"deep": null}}]</parameter>\n<parameter name="quote">{ARGUMENTS["quote"]}</parameter>\n'
    '</invoke>\n<invoke name="now">\n</invoke>\n</minimax:tool_call>',
    "kimi_k2": "<|tool_calls_section_begin|><|tool_call_begin|>functions.weather:0<|tool_call_argument_begin|>"
    f"{TEXT}<|tool_call_end|><|tool_call_begin|>functions.now:1<|tool_call_argument_begin|>{{}}<|tool_call_end|>"
    "<|tool_calls_section_end|>",
    "mistral": f'[TOOL_CALLS][{{"name": "weather", "arguments": {TEXT}}}, {{"name": "now", "arguments": {{}}}}]',
    "mistral_id": f"[TOOL_CALLS]weather[CALL_ID]a1b2c3d4e[ARGS]{TEXT}[TOOL_CALLS]now[CALL_ID]000000000[ARGS]{{}}",
    "mistral_args": f"[TOOL_CALLS]weather[ARGS]{TEXT}[TOOL_CALLS]now[ARGS]{{}}",
    "granite": f'<|tool_call|>[{{"name": "weather", "arguments": {TEXT}}}, {{"name": "now", "arguments": {{}}}}]',
}
WHOLE["phi4_mini"] = f"{WHOLE['granite']}<|/tool_call|>"
WHOLE["dsml_v4"] = WHOLE["dsml"].replace("function_calls", "tool_calls")
WHOLE["generic"] = WHOLE["hermes"]
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}, "quote": {"type": "string"}, "days": {"type": "array"}}}
TOOLS = {"weather": SCHEMA, "now": {}}
TO_THE_END = {"mistral", "mistral_id", "mistral_args", "granite"}  # formats without an end: text after a call is not expected
BROKEN = {
    "qwen3_coder": [
        "<tool_call>\n<function=weather>\n<parameter=city>x</function></tool_call>",
        '<tool_call>{"name": "now", "arguments": {}}</tool_call>',
        "<tool_call><function=now></tool_call>",
        "<tool_call>\n<function=weather>\n<parameter=city>\nRo",
    ],
    "glm45": ["<tool_call>weather\n<arg_key>city</arg_key></tool_call>", "<tool_call></tool_call>", "<arg_key>"],
    "minimax_m2": [
        '<minimax:tool_call>\n<invoke name="now">\n</invoke>',
        '<minimax:tool_call>\n<invoke name="weather">\n<parameter name="city">x</invoke>\n</minimax:tool_call>',
        "<minimax:tool_call>now</minimax:tool_call>",
    ],
    "kimi_k2": [
        "<|tool_call_begin|>now<|tool_call_argument_begin|>{}<|tool_call_end|>",
        "<|tool_calls_section_begin|>",
        "<|tool_call_begin|>functions.now:0<|tool_call_argument_begin|>{<|tool_call_end|>",
    ],
    "mistral": ["[TOOL_CALLS]", '[TOOL_CALLS][{"name": "now"', "[TOOL_CALLS]now[ARGS]{", "[TOOL_CALLS]now", "[ARGS]{}"],
    "granite": ['<|tool_call|>{"name": "now", "arguments": {}}', "<|tool_call|>[1]"],
    "hermes": [
        '<tool_call>{"name": "weather", "arguments": {</tool_call>',
        '<tool_call>{"name": 3, "arguments": {}}</tool_call>',
        '<tool_call>{"name": "f", "arguments": [1]}</tool_call> after',
        "<tool_call>",
        "</tool_call>",
        "a <tool_call> b",
        '<tool_call>{"name": "f", "arguments": {"x": NaN}}</tool_call>',
        '<tool_call>{"name": "f", "arguments": {"x": 1e999}}</tool_call>',
        "<tool_call>" + "[" * 5000 + "</tool_call>",
        '<tool_call>{"name": "f", "argum',
    ],
    "deepseek_v3": [
        "<｜tool▁calls▁begin｜>",
        "<｜tool▁calls▁end｜>",
        "x\n<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>f\n```json\n{",
        "<｜tool▁call▁begin｜>{}<｜tool▁call▁end｜>",
        "<｜tool▁calls▁begin｜> then <｜tool▁sep｜> text",
    ],
    "llama": [
        '{"name": "unknown", "parameters": {}}',
        '{"name": "now"}',
        '{"answer": 42} ',
        '<|python_tag|>print("hi")',
        '{"name": "now", "parameters": {',
        "<|python_tag|>",
        "  <|pyth",
        'text first {"name": "now", "parameters": {}}',
    ],
    "dsml": [
        '<｜DSML｜invoke name="f">\n<｜DSML｜parameter name="a" string="true">x</｜DSML｜parameter>',
        "<｜DSML｜function_calls>",
        '<｜DSML｜invoke name="f">text</｜DSML｜invoke>',
        '<｜DSML｜invoke name="f"><｜DSML｜parameter name="a" string="false">x</｜DSML｜parameter></｜DSML｜invoke>',
        "<｜DSML｜invoke</｜DSML｜invoke>",
    ],
}


def parse(text: str, name: str | None, pieces: list[str] | None = None, template: str = "", prompt: str = "") -> Parsed:
    tool_format = FORMATS[name] if name else None
    parser = make_output_parser(template, prompt, tool_format=tool_format, tools=TOOLS)
    deltas = [delta for piece in (pieces or [text]) for delta in parser.feed(piece)] + parser.finish()
    for delta in deltas:
        assert isinstance(delta, ToolCallDelta) or delta.text
    return collect(deltas)


def cut(text: str, seed: int) -> list[str]:
    choose = random.Random(seed)
    pieces, at = [], 0
    while at < len(text):
        size = choose.choice((1, 1, 2, 3, 7, 40))
        pieces.append(text[at : at + size])
        at += size
    return pieces


def same(a: Parsed, b: Parsed) -> bool:
    calls = [[(call.name, call.arguments) for call in parsed.tool_calls] for parsed in (a, b)]
    return (a.content, a.reasoning, calls[0]) == (b.content, b.reasoning, calls[1])


@pytest.mark.parametrize("name", WHOLE)
def test_tool_calls_are_parsed(name):
    before = "" if name == "llama" else "Let me look.\n\n"
    actual = parse(before + WHOLE[name] + ("" if name in TO_THE_END else "\n"), name)
    assert [call.name for call in actual.tool_calls] == ["weather", "now"]
    assert [json.loads(call.arguments) for call in actual.tool_calls] == [ARGUMENTS, {}]
    assert actual.content == before.strip()
    assert len({call.id for call in actual.tool_calls}) == 2 and all(
        re.fullmatch("call_[0-9a-f]{24}", c.id) for c in actual.tool_calls
    )


@pytest.mark.parametrize("name", WHOLE)
def test_the_first_delta_of_a_call_has_its_name(name):
    parser = make_output_parser("", "", tool_format=FORMATS[name], tools=TOOLS)
    deltas = [d for d in parser.feed(WHOLE[name]) + parser.finish() if isinstance(d, ToolCallDelta)]
    heads = [(d.index, d.name) for d in deltas if d.id is not None]
    assert heads == [(0, "weather"), (1, "now")]
    assert [d.index for d in deltas] == sorted(d.index for d in deltas)


@pytest.mark.parametrize("name", BROKEN)
def test_text_that_is_not_a_call_is_content(name):
    for text in BROKEN[name]:
        actual = parse(text, name)
        assert actual == Parsed(text, "", ()), text


@pytest.mark.parametrize("name", WHOLE)
@pytest.mark.parametrize("seed", range(5))
def test_chunk_boundaries_change_nothing(name, seed):
    texts = [WHOLE[name], "a\n\n" + WHOLE[name] + "\n \nb", *BROKEN.get(name, []), WHOLE[name] + BROKEN.get(name, [""])[0]]
    for text in texts:
        if len(text) < 2000:
            assert same(parse(text, name), parse(text, name, cut(text, seed))), text
            thoughtful = "<think>\nhm\n\nso\n</think>\n\n" + text
            whole = parse(thoughtful, name, template=THINKS)
            assert whole.reasoning == "hm\n\nso"
            assert same(whole, parse(thoughtful, name, cut(thoughtful, seed), template=THINKS))


@pytest.mark.parametrize("name", WHOLE)
def test_random_markers_lose_nothing_in_any_chunks(name):
    parts = [*FORMATS[name].markers, *WHOLE[name].split(">"), "{", "}", '"', "\\", "\n", " ", "a", "<", "｜"]
    for seed in range(60):
        choose = random.Random(seed)
        text = "".join(choose.choice(parts) for _ in range(30))
        whole = parse(text, name)
        assert same(whole, parse(text, name, cut(text, seed))), text
        if not whole.tool_calls:
            assert whole.content == text


@pytest.mark.parametrize(
    ("prompt", "text", "reasoning", "content"),
    [
        ("", "<think>a</think>b", "a", "b"),
        ("", "\n <think>\na\n</think>\n\nb\n", "a", "b\n"),
        ("x<think>\n", "a\nb</think>c", "a\nb", "c"),
        ("x<think>\n", "never closed", "never closed", ""),
        ("x<think>\n\n</think>\n\n", "plain", "", "plain"),
        ("", "no tag </think> here <think>", "", "no tag </think> here <think>"),
        ("", "<think>a</think>b<think>c</think>", "a", "b<think>c</think>"),
        ("", "<think>a</thi</think></think>", "a</thi", "</think>"),
        ("", "<think></think>", "", ""),
        ("", "<thin", "", "<thin"),
        ("", " " * 100 + "<think>a</think>", "", " " * 100 + "<think>a</think>"),
        ("x<think>", "a</think", "a</think", ""),
    ],
)
def test_reasoning_is_separate(prompt, text, reasoning, content):
    assert parse(text, None, template=THINKS, prompt=prompt) == Parsed(content, reasoning, ())
    assert parse(text, None, list(text), template=THINKS, prompt=prompt) == Parsed(content, reasoning, ())


def test_models_without_reasoning_may_write_tags():
    assert parse("<think>a</think>b", None).content == "<think>a</think>b"


@pytest.mark.parametrize("name", WHOLE)
@pytest.mark.parametrize(("size", "length"), [(1, 1 << 16), (1 << 20, 1 << 20)])
def test_a_megabyte_of_anything_ends(name, size, length):
    """Takes linear time: a quadratic parser would take hours."""
    marks = FORMATS[name].markers
    for unit in (marks[0], marks[0][:-1], '{"name": "now", "parameters": ', '{"a":[', "\n", "</think", '"\\'):
        text = "x" + unit * (length // len(unit))
        actual = parse(text, name, [text[i : i + size] for i in range(0, len(text), size)], template=THINKS)
        assert actual == Parsed(text, "", ())


def test_a_megabyte_of_calls():
    for name, text in WHOLE.items():
        assert len(parse(text * (1 << 10), name).tool_calls) == 2 << 10


def test_special_tokens_are_skipped_except_markers():
    drop = ["<|im_end|>", "<think>", "</think>", "<tool_call>"]
    parser = make_output_parser(THINKS, "", tool_format=FORMATS["hermes"], drop=drop)
    text = '<think>a</think>b<|im_end|><tool_call>{"name": "f", "arguments": {}}</tool_call><|im_end|>'
    actual = collect([d for piece in text for d in parser.feed(piece)] + parser.finish())
    assert (actual.reasoning, actual.content, actual.tool_calls[0].name) == ("a", "b", "f")


def test_markers_may_be_special_tokens(byte_tokenizer):
    assert not special_markers(byte_tokenizer, FORMATS["hermes"])

    class Special:
        all_special_tokens = ["<|python_tag|>"]

    assert special_markers(Special(), FORMATS["llama"]) and not special_markers(Special(), None)


def test_arguments_that_cannot_be_encoded_are_escaped():
    text = '<tool_call>{"name": "f", "arguments": {"a": "\\ud800"}}</tool_call>'
    assert parse(text, "hermes").tool_calls[0].arguments == '{"a": "\\ud800"}'


@pytest.mark.parametrize(
    ("template", "name"),
    [
        ("{{ '<tool_call>' }}", "hermes"),
        ("<tool_call><function=x>", "qwen3_coder"),
        ("<seed:tool_call><function=x>", "seed_oss"),
        ("<tool_call>{name}\n<arg_key>k</arg_key>\n<arg_value>v</arg_value>", "glm45"),
        ("<tool_call>{name}<arg_key>k</arg_key><arg_value>v</arg_value>", "glm47"),
        ("<minimax:tool_call>", "minimax_m2"),
        ("<|tool_calls_section_begin|>", "kimi_k2"),
        ("[TOOL_CALLS][", "mistral"),
        ("[TOOL_CALLS]x[CALL_ID]y[ARGS]", "mistral_id"),
        ("[TOOL_CALLS]x[ARGS]", "mistral_args"),
        ("respond with <|tool_call|>", "granite"),
        ("<|tool_call|><|/tool_call|>", "phi4_mini"),
        ("<|channel|>analysis<|message|>", "harmony"),
        ("<｜DSML｜tool_calls>", "dsml_v4"),
        ("<｜tool▁call▁begin｜>function<｜tool▁sep｜>```json", "deepseek_v3"),
        ("<｜tool▁call▁begin｜><｜tool▁sep｜>", "deepseek_v31"),
        ("<｜DSML｜invoke", "dsml"),
        ('<|start_header_id|> {"name": function name, "parameters": dictionary}', "llama"),
        ("{{ messages }}", None),
    ],
)
def test_the_format_is_detected_from_the_template(template, name):
    actual = detect(template)
    assert (actual and actual.name) == name


def test_content_is_emitted_as_soon_as_it_is_unambiguous():
    parser = make_output_parser("", "", tool_format=FORMATS["hermes"])
    assert parser.feed("Hello") == [ContentDelta("Hello")]
    assert parser.feed(" wor<") == [ContentDelta(" wor")]
    assert parser.feed("b>") == [ContentDelta("<b>")]
