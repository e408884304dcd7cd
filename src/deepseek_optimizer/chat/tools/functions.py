"""Functions with parameters in tags, of Qwen3-Coder and Qwen3.5, and of Seed-OSS. Strings are written verbatim:

    <tool_call>
    <function=NAME>
    <parameter=KEY>
    value
    </parameter>
    </function>
    </tool_call>

Seed-OSS has `<seed:tool_call>`, and no newlines around values.
"""

from __future__ import annotations

from ...engine.grammar.calls import CallShape, ParameterShape
from .base import Call, MarkedCallParser, Tools, make_call
from .parameters import read_parameters
from .shaped import ShapedFormat

FUNCTION, SEED = "<function=", "<seed:tool_call>"
_FUNCTION_END, _PARAMETER, _PARAMETER_END = "</function>", "<parameter=", "</parameter>"


def read(text: str, tools: Tools) -> Call | None:
    """Parses the text between the outer tags."""
    text = text.strip()
    name, opened, body = text.removeprefix(FUNCTION).partition(">")
    if not text.startswith(FUNCTION) or not opened or not body.endswith(_FUNCTION_END):
        return None
    body = body.removesuffix(_FUNCTION_END)
    arguments = read_parameters(body, _PARAMETER, ">", _PARAMETER_END, tools.get(name.strip(), {}), strip="\n")
    return None if arguments is None else make_call(name.strip(), arguments)


def _format(name: str, begin: str, end: str, newline: str) -> ShapedFormat:
    return ShapedFormat(
        name=name,
        markers=(begin, end),
        shape=CallShape(
            before=f"{begin}\n{FUNCTION}",
            between=">\n",
            after=f"{_FUNCTION_END}\n{end}",
            separator="\n",
            trigger=begin,
            parameters=ParameterShape(_PARAMETER, f">{newline}", f"{newline}{_PARAMETER_END}\n"),
        ),
        free=lambda tools: MarkedCallParser(begin, end, lambda text: read(text, tools)),
    )


QWEN3_CODER = _format("qwen3_coder", "<tool_call>", "</tool_call>", "\n")
SEED_OSS = _format("seed_oss", SEED, "</seed:tool_call>", "")
