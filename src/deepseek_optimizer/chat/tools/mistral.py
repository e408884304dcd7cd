"""Mistral: `[TOOL_CALLS]` and a list of calls, or one call each time. Later models write an id, and then none:

[TOOL_CALLS][{"name": "NAME", "arguments": {...}}, ...]
[TOOL_CALLS]NAME[CALL_ID]123456789[ARGS]{...}
[TOOL_CALLS]NAME[ARGS]{...}
"""

from __future__ import annotations

from typing import Any

from ...engine.grammar.calls import CallShape, Pattern
from ..deltas import OutputParser
from .base import Call, MarkedCallParser, Tools, make_call, read_json
from .shaped import ShapedFormat

BEGIN, ID, ARGUMENTS = "[TOOL_CALLS]", "[CALL_ID]", "[ARGS]"


def read_list(value: Any, names: str = "arguments") -> list[Call] | None:
    """The calls of a list `[{"name": ..., "arguments": {...}}, ...]`; None if any is invalid.

    Args:
        value: as parsed from JSON.
        names: key of the arguments.
    """
    if not isinstance(value, list) or not all(isinstance(one, dict) for one in value):
        return None
    calls = [make_call(one.get("name"), one.get(names)) for one in value]
    return [call for call in calls if call is not None] if all(calls) else None


def read(text: str) -> Call | list[Call] | None:
    """Parses the text after `[TOOL_CALLS]`."""
    text = text.strip()
    if text.startswith("["):
        return read_list(read_json(text))
    head, separator, arguments = text.partition(ARGUMENTS)
    if not separator:  # some models omit the token
        head, separator, arguments = text.partition("{")
        arguments = separator + arguments
    return make_call(head.partition(ID)[0].strip(), arguments.strip()) if separator else None


def _free(tools: Tools) -> OutputParser:
    return MarkedCallParser(BEGIN, "", read)


_MARKERS = (BEGIN, ID, ARGUMENTS)
LISTED = ShapedFormat(
    "mistral",
    _MARKERS,
    CallShape(
        begin=f"{BEGIN}[",
        before='{"name": "',
        between='", "arguments": ',
        after="}",
        separator=", ",
        end="]",
        trigger=BEGIN,
    ),
    _free,
)
NUMBERED = ShapedFormat(
    "mistral_id",
    _MARKERS,
    CallShape(before=BEGIN, between=(ID, Pattern("[a-zA-Z0-9]{9}", "a1b2c3d4e"), ARGUMENTS), after="", trigger=BEGIN),
    _free,
)
PLAIN = ShapedFormat("mistral_args", _MARKERS, CallShape(before=BEGIN, between=ARGUMENTS, after="", trigger=BEGIN), _free)
