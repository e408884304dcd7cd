"""Hermes and Qwen: `<tool_call>\n{"name": ..., "arguments": {...}}\n</tool_call>`, one after another."""

from __future__ import annotations

from ...engine.grammar.source import CallShape
from ..deltas import OutputParser
from .base import Call, MarkedCallParser, make_call, read_json

BEGIN, END = "<tool_call>", "</tool_call>"


class HermesFormat:
    """See the module."""

    name = "hermes"
    markers = (BEGIN, END)
    shape = CallShape(before=BEGIN + '\n{"name": "', between='", "arguments": ', after="}\n" + END, separator="\n")

    def parser(self, names: frozenset[str]) -> OutputParser:
        return MarkedCallParser(BEGIN, END, read)


def read(text: str) -> Call | None:
    """Parses the text between the tags."""
    value = read_json(text)
    return make_call(value.get("name"), value.get("arguments")) if isinstance(value, dict) else None
