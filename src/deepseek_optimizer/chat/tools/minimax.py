"""MiniMax-M2: calls with parameters in tags, strings verbatim, within one section:

<minimax:tool_call>
<invoke name="NAME">
<parameter name="KEY">value</parameter>
</invoke>
</minimax:tool_call>
"""

from __future__ import annotations

from ...engine.grammar.calls import CallShape, ParameterShape
from .base import Call, MarkedCallParser, Tools, make_call
from .parameters import read_parameters
from .shaped import ShapedFormat

BEGIN, END = "<minimax:tool_call>", "</minimax:tool_call>"
_INVOKE, _INVOKE_END = '<invoke name="', "</invoke>"
_PARAMETER, _PARAMETER_END = '<parameter name="', "</parameter>"


def read(text: str, tools: Tools) -> list[Call] | None:
    """Parses the text between the outer tags."""
    calls: list[Call] = []
    for part in text.split(_INVOKE_END):
        part = part.strip()
        if not part:
            continue
        name, opened, body = part.removeprefix(_INVOKE).partition('">')
        arguments = read_parameters(body, _PARAMETER, '">', _PARAMETER_END, tools.get(name, {}))
        call = None if arguments is None else make_call(name, arguments)
        if not part.startswith(_INVOKE) or not opened or call is None:
            return None
        calls.append(call)
    return calls


MINIMAX_M2 = ShapedFormat(
    name="minimax_m2",
    markers=(BEGIN, END),
    shape=CallShape(
        begin=f"{BEGIN}\n",
        before=_INVOKE,
        between='">\n',
        after=f"{_INVOKE_END}\n",
        end=END,
        trigger=BEGIN,
        parameters=ParameterShape(_PARAMETER, '">', f"{_PARAMETER_END}\n"),
    ),
    free=lambda tools: MarkedCallParser(BEGIN, END, lambda text: read(text, tools), end_optional=False),
)
