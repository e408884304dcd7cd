"""Tools for templates without them: what the messages become."""

from __future__ import annotations

import pytest

from deepseek_optimizer.chat.tools import FORMATS
from deepseek_optimizer.chat.tools.generic import description, with_described_tools

TOOL = {"type": "function", "function": {"name": "now", "description": "The time", "parameters": {"type": "object"}}}
SHAPE = FORMATS["generic"].shape
USER, SYSTEM = {"role": "user", "content": "U"}, {"role": "system", "content": "S"}
CALL = {"type": "function", "id": "a", "function": {"name": "now", "arguments": {"tz": "é"}}}
WRITTEN = '<tool_call>\n{"name": "now", "arguments": {"tz": "é"}}\n</tool_call>'


def changed(*messages, system=True):
    return with_described_tools(messages, [TOOL], SHAPE, system=system)


def test_the_description_joins_the_system_message():
    text = description([TOOL], SHAPE)
    assert '{"name": "now", "description": "The time", "parameters": {"type": "object"}}' in text
    assert '<tool_call>\n{"name": "example_tool"' in text
    assert changed(USER) == [{"role": "system", "content": text}, USER]
    assert changed(SYSTEM, USER) == [{"role": "system", "content": f"S\n\n{text}"}, USER]
    assert changed(SYSTEM, USER, system=False) == [{"role": "user", "content": f"S\n\n{text}\n\nU"}]
    assert changed(USER, system=False) == [{"role": "user", "content": f"{text}\n\nU"}]


def test_calls_and_results_become_messages():
    answer = {"role": "assistant", "content": "Well.", "tool_calls": [CALL, CALL]}
    results = [{"role": "tool", "content": str(i), "tool_call_id": "a"} for i in range(2)]
    actual = changed(USER, answer, *results)[2:]
    assert actual[0] == {"role": "assistant", "content": f"Well.\n{WRITTEN}\n{WRITTEN}"}
    assert actual[1]["content"] == "<tool_response>\n0\n</tool_response>\n<tool_response>\n1\n</tool_response>"
    assert [message["role"] for message in actual] == ["assistant", "user"]
    assert changed(USER, answer, *results, USER)[-1]["content"].endswith("</tool_response>\nU")
    again = changed(USER, answer, results[0], {"role": "assistant", "content": "A"}, USER)[2:]
    assert [message["role"] for message in again] == ["assistant", "user", "assistant", "user"]
    assert all(message.keys() == {"role", "content"} for message in again)


def test_the_messages_are_not_modified():
    messages = [dict(USER), {"role": "tool", "content": "x"}]
    changed(*messages, system=False)
    assert messages == [USER, {"role": "tool", "content": "x"}]


@pytest.mark.parametrize("name", [name for name, tool_format in FORMATS.items() if tool_format.shape])
def test_every_shape_can_be_described(name):
    """And its own parser reads the example."""
    from deepseek_optimizer.chat.deltas import collect

    text = description([TOOL], FORMATS[name].shape)
    example = text.partition("exactly this form:\n")[2].partition("\n\nYou then")[0]
    parser = FORMATS[name].parser({"example_tool": {}})
    (call,) = collect(parser.feed(example) + parser.finish()).tool_calls
    assert (call.name, call.arguments) == ("example_tool", '{"example_parameter": "value"}')
