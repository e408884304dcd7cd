"""DeepSeek's tool calls between special tokens, in the formats of V3 and R1, and of V3.1.

V3 and R1 write the kind of tool and fenced arguments, V3.1 only the name and the arguments:

    <｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>NAME
    ```json
    {...}
    ```<｜tool▁call▁end｜><｜tool▁calls▁end｜>

    <｜tool▁calls▁begin｜><｜tool▁call▁begin｜>NAME<｜tool▁sep｜>{...}<｜tool▁call▁end｜><｜tool▁calls▁end｜>
"""

from __future__ import annotations

from ...engine.grammar.calls import CallShape
from ..deltas import OutputParser
from .base import Call, MarkedCallParser, Tools, make_call
from .shaped import ShapedFormat

CALLS_BEGIN, CALLS_END = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
CALL_BEGIN, CALL_END, SEPARATOR = "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>", "<｜tool▁sep｜>"
_KIND, _FENCE = "function", "```"


def read(text: str) -> Call | None:
    """Parses the text between the tokens around a call."""
    head, separator, tail = text.partition(SEPARATOR)
    if not separator:
        return None
    head = head.strip()
    if head == _KIND:
        name, _, fenced = tail.partition("\n")
        fenced = fenced.strip()
        if fenced.startswith(_FENCE):
            return make_call(name.strip(), _unfenced(fenced))
    return make_call(head, tail.strip())


def _unfenced(text: str) -> str:
    """The text without the fence around it."""
    body = text.partition("\n")[2]
    return body.removesuffix(_FENCE)


def _free(tools: Tools) -> OutputParser:
    """A parser for both formats."""
    return MarkedCallParser(CALL_BEGIN, CALL_END, read, (CALLS_BEGIN, CALLS_END), (CALLS_END,))


_MARKERS = (CALLS_BEGIN, CALLS_END, CALL_BEGIN, CALL_END, SEPARATOR)
V3 = ShapedFormat(
    "deepseek_v3",
    _MARKERS,
    CallShape(
        begin=CALLS_BEGIN,
        before=f"{CALL_BEGIN}{_KIND}{SEPARATOR}",
        between="\n```json\n",
        after=f"\n```{CALL_END}",
        separator="\n",
        end=CALLS_END,
        trigger=CALLS_BEGIN,
    ),
    _free,
)
V31 = ShapedFormat(
    "deepseek_v31",
    _MARKERS,
    CallShape(begin=CALLS_BEGIN, before=CALL_BEGIN, between=SEPARATOR, after=CALL_END, end=CALLS_END, trigger=CALLS_BEGIN),
    _free,
)
