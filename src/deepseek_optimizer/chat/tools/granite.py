"""Lists of calls after a special token: Granite 3, and Phi-4-mini with an end.

<|tool_call|>[{"name": "NAME", "arguments": {...}}, ...]
"""

from __future__ import annotations

from ...engine.grammar.calls import CallShape
from .base import MarkedCallParser, read_json
from .mistral import read_list
from .shaped import ShapedFormat

BEGIN, PHI_END = "<|tool_call|>", "<|/tool_call|>"


def _format(name: str, end: str) -> ShapedFormat:
    return ShapedFormat(
        name=name,
        markers=(BEGIN, end) if end else (BEGIN,),
        shape=CallShape(
            begin=f"{BEGIN}[",
            before='{"name": "',
            between='", "arguments": ',
            after="}",
            separator=", ",
            end=f"]{end}",
            trigger=BEGIN,
        ),
        free=lambda tools: MarkedCallParser(BEGIN, end, lambda text: read_list(read_json(text))),
    )


GRANITE3, PHI4_MINI = _format("granite", ""), _format("phi4_mini", PHI_END)
