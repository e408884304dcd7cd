"""GLM-4.5 and later: names and values in pairs of tags, strings verbatim. GLM-4.7 writes no newlines.

<tool_call>NAME
<arg_key>KEY</arg_key>
<arg_value>value</arg_value>
</tool_call>
"""

from __future__ import annotations

from ...engine.grammar.calls import CallShape, ParameterShape
from .base import Call, MarkedCallParser, Tools, make_call
from .parameters import read_parameters
from .shaped import ShapedFormat

KEY, KEY_END, VALUE, VALUE_END = "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>"
_BEGIN, _END = "<tool_call>", "</tool_call>"


def read(text: str, tools: Tools) -> Call | None:
    """Parses the text between the outer tags."""
    head, key, rest = text.partition(KEY)
    name = head.strip()
    joined = (key + rest).replace(f"{KEY_END}\n{VALUE}", KEY_END + VALUE)
    arguments = read_parameters(joined, KEY, KEY_END + VALUE, VALUE_END, tools.get(name, {}))
    return None if arguments is None else make_call(name, arguments)


def _format(name: str, newline: str) -> ShapedFormat:
    return ShapedFormat(
        name=name,
        markers=(_BEGIN, _END, KEY, KEY_END, VALUE, VALUE_END),
        shape=CallShape(
            before=_BEGIN,
            between=newline,
            after=_END,
            separator="\n",
            trigger=_BEGIN,
            parameters=ParameterShape(KEY, f"{KEY_END}{newline}{VALUE}", f"{VALUE_END}{newline}"),
        ),
        free=lambda tools: MarkedCallParser(_BEGIN, _END, lambda text: read(text, tools)),
    )


GLM45, GLM47 = _format("glm45", "\n"), _format("glm47", "")
