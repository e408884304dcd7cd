"""Hermes and Qwen: `<tool_call>\n{"name": ..., "arguments": {...}}\n</tool_call>`, one after another."""

from __future__ import annotations

from ...engine.grammar.calls import CallShape, Pattern
from .base import Call, MarkedCallParser, make_call, read_json
from .shaped import ShapedFormat

BEGIN, END = "<tool_call>", "</tool_call>"
_NEWLINE = Pattern("\\n?", "\n")


def read(text: str) -> Call | None:
    """Parses the text between the tags."""
    value = read_json(text)
    return make_call(value.get("name"), value.get("arguments")) if isinstance(value, dict) else None


HERMES = ShapedFormat(
    name="hermes",
    markers=(BEGIN, END),
    shape=CallShape(
        before=(BEGIN, _NEWLINE, '{"name": "'),
        between='", "arguments": ',
        after=("}", _NEWLINE, END),
        separator="\n",
        trigger=BEGIN,
    ),
    free=lambda tools: MarkedCallParser(BEGIN, END, read),
)
