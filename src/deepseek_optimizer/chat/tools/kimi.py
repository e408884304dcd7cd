"""Kimi K2 and Kimi Linear: calls with numbers between special tokens:

<|tool_calls_section_begin|><|tool_call_begin|>functions.NAME:0<|tool_call_argument_begin|>{...}<|tool_call_end|>...
<|tool_calls_section_end|>
"""

from __future__ import annotations

from ...engine.grammar.calls import CallShape, Pattern
from .base import Call, MarkedCallParser, make_call
from .shaped import ShapedFormat

SECTION = "<|tool_calls_section_begin|>"
_SECTION_END = "<|tool_calls_section_end|>"
_BEGIN, _ARGUMENTS, _END = "<|tool_call_begin|>", "<|tool_call_argument_begin|>", "<|tool_call_end|>"
_PREFIX = "functions."


def read(text: str) -> Call | None:
    """Parses the text between the tokens around a call."""
    head, separator, arguments = text.partition(_ARGUMENTS)
    name, _, number = head.strip().removeprefix(_PREFIX).rpartition(":")
    return make_call(name, arguments.strip()) if separator and number.isdecimal() else None


KIMI_K2 = ShapedFormat(
    name="kimi_k2",
    markers=(SECTION, _SECTION_END, _BEGIN, _ARGUMENTS, _END),
    shape=CallShape(
        begin=SECTION,
        before=f"{_BEGIN}{_PREFIX}",
        between=(":", Pattern("[0-9]{1,3}", "0"), _ARGUMENTS),
        after=_END,
        end=_SECTION_END,
        trigger=SECTION,
    ),
    free=lambda tools: MarkedCallParser(_BEGIN, _END, read, (SECTION, _SECTION_END), (_SECTION_END,)),
)
