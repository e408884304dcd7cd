"""Calls that a grammar enforces: arguments are emitted as they are written, and nothing of a call is content."""

from __future__ import annotations

import json

import pytest

from deepseek_optimizer.chat.deltas import ContentDelta, ToolCallDelta, collect
from deepseek_optimizer.chat.tools import FORMATS
from deepseek_optimizer.chat.tools.generic import written

ARGUMENTS = {"city": 'Zürich "b" \\ </p\n<x>', "days": [1, {"a": None, "b": '}]"'}], "on": True, "other": "1"}
SCHEMA = {
    "type": "object",
    "properties": {
        "city": {"type": "string"},
        "days": {"type": "array"},
        "on": {"type": "boolean"},
        "other": {"type": ["string", "null"]},
    },
}
TOOLS = {"weather": SCHEMA, "now": {}}
CALLS = [{"function": {"name": "weather", "arguments": ARGUMENTS}}, {"function": {"name": "now", "arguments": {}}}]
SHAPED = [name for name, tool_format in FORMATS.items() if tool_format.shape]
MARKED = [name for name in SHAPED if FORMATS[name].shape.trigger]


def deltas_of(name, pieces, enforced="auto"):
    parser = FORMATS[name].parser(TOOLS, enforced)
    return [delta for piece in pieces for delta in parser.feed(piece)] + parser.finish()


def check(name, text, content=""):
    """Checks the calls and the content in every split of the text into two parts, and character by character."""
    for pieces in ([text], list(text), *([text[:at], text[at:]] for at in range(1, len(text)))):
        deltas = deltas_of(name, pieces)
        actual = collect(deltas)
        assert [call.name for call in actual.tool_calls] == ["weather", "now"], pieces
        assert [json.loads(call.arguments) for call in actual.tool_calls] == [ARGUMENTS, {}], pieces
        assert actual.content == content, pieces
        heads = [delta for delta in deltas if isinstance(delta, ToolCallDelta) and delta.id is not None]
        assert [(delta.index, delta.name, delta.arguments) for delta in heads] == [(0, "weather", ""), (1, "now", "")]


@pytest.mark.parametrize("name", SHAPED)
def test_calls_in_every_split(name):
    check(name, written(CALLS, FORMATS[name].shape))


@pytest.mark.parametrize("name", MARKED)
def test_text_around_calls_is_content(name):
    text = written(CALLS, FORMATS[name].shape)
    after = "" if name == "mistral_args" else "\nDone."
    check(name, f"Let me see: < [ {{\n\n{text}{after}", "Let me see: < [ {" + after.strip())


@pytest.mark.parametrize("name", SHAPED)
def test_arguments_are_emitted_as_they_are_written(name):
    text = written(CALLS[:1], FORMATS[name].shape)
    begin = text.index("Zürich") + 1
    before = collect(deltas_of(name, list(text[:begin])))
    after = collect(deltas_of(name, list(text[: begin + 3])))
    assert before.tool_calls[0].arguments == '{"city": "Z' and after.tool_calls[0].arguments == '{"city": "Züri'


@pytest.mark.parametrize("name", SHAPED)
def test_a_call_that_is_cut_off_is_never_content(name):
    text = written(CALLS, FORMATS[name].shape)
    for end in range(len(text)):
        actual = collect(deltas_of(name, [text[:end]], "required"))
        assert actual.content == "", text[:end]
        assert end < 3 or collect(deltas_of(name, [text[:end]], "auto")).content == ""
        for call in actual.tool_calls:
            assert json.dumps(ARGUMENTS, ensure_ascii=False).startswith(call.arguments) or call.name == "now"


def test_harmony_channels_in_every_split():
    before = (
        "<|channel|>analysis<|message|>I need\nthe weather.<|end|><|start|>assistant<|channel|>commentary<|message|>"
        "Let me look.<|end|><|start|>assistant"
    )
    after = f"<|message|>{json.dumps(ARGUMENTS)}<|call|>"
    text = f"{before}<|channel|>commentary to=functions.weather <|constrain|>json{after}"
    other = f"{before} to=functions.weather<|channel|>commentary json{after}"
    for whole in (text, other):
        for enforced in ("auto", "no"):
            for pieces in ([whole], list(whole), *([whole[:at], whole[at:]] for at in range(1, len(whole)))):
                parser = FORMATS["harmony"].parser(TOOLS, enforced)
                actual = collect([delta for piece in pieces for delta in parser.feed(piece)] + parser.finish())
                assert actual.reasoning == "I need\nthe weather." and actual.content == "Let me look.", pieces
                assert actual.tool_calls[0].name == "weather" and json.loads(actual.tool_calls[0].arguments) == ARGUMENTS


@pytest.mark.parametrize(
    ("text", "reasoning", "content"),
    [
        ("<|channel|>final<|message|>Hi <b>|<|return|>", "", "Hi <b>|"),
        ("<|channel|>analysis<|message|>a<|end|><|start|>assistant<|channel|>analysis<|message|>b<|end|>", "a\nb", ""),
        ("<|channel|>analysis<|message|>a<|end|><|start|>assistant<|channel|>final<|message|>b", "a", "b"),
        ("<|channel|>analysis<|message|>cut", "cut", ""),
        ("<|channel|>anal", "", ""),
        ("plain text", "", "plain text"),
        ("x" * 2000, "", "x" * 2000),
        ("", "", ""),
    ],
)
def test_harmony_without_calls(text, reasoning, content):
    for pieces in ([text], list(text)):
        parser = FORMATS["harmony"].parser({})
        actual = collect([delta for piece in pieces for delta in parser.feed(piece)] + parser.finish())
        assert (actual.reasoning, actual.content, actual.tool_calls) == (reasoning, content, ())


def test_harmony_calls_that_are_cut_off():
    text = "<|channel|>commentary to=functions.weather <|constrain|>json<|message|>" + '{"city": "Ro'
    for enforced, arguments in (("auto", '{"city": "Ro'), ("no", None)):
        parser = FORMATS["harmony"].parser(TOOLS, enforced)
        actual = collect(parser.feed(text) + parser.finish())
        assert [call.arguments for call in actual.tool_calls] == ([arguments] if arguments else [])


@pytest.mark.parametrize("name", [name for name in MARKED if FORMATS[name].shape.parameters])
def test_values_have_the_types_of_the_schema(name):
    texts = {"city": "5", "days": "5", "on": "True", "other": "null", "more": '{"a": 1}', "odd": "1 2"}
    shape = FORMATS[name].shape
    if shape.parameters.json_between is not None:
        return  # the text says which values are JSON
    call = written([{"function": {"name": "weather", "arguments": texts}}], shape)
    wanted = {"city": "5", "days": 5, "on": True, "other": None, "more": {"a": 1}, "odd": "1 2"}
    for parser in (FORMATS[name].parser(TOOLS), FORMATS[name].parser(TOOLS, enforced="auto")):
        actual = collect(parser.feed(call) + parser.finish())
        assert json.loads(actual.tool_calls[0].arguments) == wanted


@pytest.mark.parametrize("name", MARKED)
def test_other_tags_stay_text(name):
    text = 'a < b, [TOOL], <tool> and {"name": 1} } ] , ; '
    deltas = deltas_of(name, list(text))
    assert "".join(d.text for d in deltas if isinstance(d, ContentDelta)) == text
