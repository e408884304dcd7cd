"""DeepSeek's calls between tokens of their own, as V3 and R1 write them and as V3.1 does.

V3 and R1 name the kind of tool and fence the arguments, V3.1 has the name and the arguments alone:

    <｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>NAME
    ```json
    {...}
    ```<｜tool▁call▁end｜><｜tool▁calls▁end｜>

    <｜tool▁calls▁begin｜><｜tool▁call▁begin｜>NAME<｜tool▁sep｜>{...}<｜tool▁call▁end｜><｜tool▁calls▁end｜>
"""

from __future__ import annotations

from dataclasses import dataclass

from ...engine.grammar.source import CallShape
from ..deltas import OutputParser
from .base import Call, MarkedCallParser, make_call

CALLS_BEGIN, CALLS_END = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
CALL_BEGIN, CALL_END, SEPARATOR = "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>", "<｜tool▁sep｜>"
_KIND, _FENCE = "function", "```"


@dataclass(frozen=True)
class DeepSeekFormat:
    """Both ways are read; `name` and `shape` are of the one that the model's template shows it."""

    name: str
    shape: CallShape
    markers = (CALLS_BEGIN, CALLS_END, CALL_BEGIN, CALL_END, SEPARATOR)

    def parser(self, names: frozenset[str]) -> OutputParser:
        return MarkedCallParser(CALL_BEGIN, CALL_END, read, (CALLS_BEGIN, CALLS_END), (CALLS_END,))


V3 = DeepSeekFormat(
    "deepseek_v3",
    CallShape(
        begin=CALLS_BEGIN,
        before=f"{CALL_BEGIN}{_KIND}{SEPARATOR}",
        between="\n```json\n",
        after=f"\n```{CALL_END}",
        separator="\n",
        end=CALLS_END,
    ),
)
V31 = DeepSeekFormat(
    "deepseek_v31", CallShape(begin=CALLS_BEGIN, before=CALL_BEGIN, between=SEPARATOR, after=CALL_END, end=CALLS_END)
)


def read(text: str) -> Call | None:
    """What stands between the tokens around a call."""
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
    """Without ```json before it and ``` behind it."""
    body = text.partition("\n")[2]
    return body.removesuffix(_FENCE)
