"""DSML, the format of DeepSeek since V3.2. Strings are written verbatim, other values as JSON:

    <｜DSML｜function_calls>
    <｜DSML｜invoke name="NAME">
    <｜DSML｜parameter name="KEY" string="true">text</｜DSML｜parameter>
    <｜DSML｜parameter name="KEY" string="false">[1, 2]</｜DSML｜parameter>
    </｜DSML｜invoke>
    </｜DSML｜function_calls>

V4 calls the outer element `tool_calls`.
"""

from __future__ import annotations

from typing import Any

from ...engine.grammar.calls import CallShape, ParameterShape
from .base import Call, MarkedCallParser, make_call, read_json
from .shaped import ShapedFormat

MARK = "｜DSML｜"
INVOKE, INVOKE_END = f"<{MARK}invoke", f"</{MARK}invoke>"
_PARAMETER, _PARAMETER_END = f"<{MARK}parameter", f"</{MARK}parameter>"
_OPENS = (f"<{MARK}function_calls>", f"<{MARK}tool_calls>")
_CLOSES = (f"</{MARK}function_calls>", f"</{MARK}tool_calls>")
_MISSING = object()


def read(text: str) -> Call | None:
    """Parses the text between `<｜DSML｜invoke` and its end."""
    at = text.find(">") + 1
    name = _attributes(text[:at]).get("name")
    arguments: dict[str, Any] = {}
    while (at := _skip_space(text, at)) < len(text):
        if not text.startswith(_PARAMETER, at):
            return make_call(name, text[at:]) if not arguments else None  # some answers contain a single JSON object here
        opened = text.find(">", at)
        closed = text.find(_PARAMETER_END, opened)
        if opened < 0 or closed < 0:
            return None
        attributes = _attributes(text[at + len(_PARAMETER) : opened])
        value: Any = text[opened + 1 : closed]
        if attributes.get("string") == "false":
            value = _value(value)
        key = attributes.get("name")
        if key is None or key in arguments or value is _MISSING:
            return None
        arguments[key] = value
        at = closed + len(_PARAMETER_END)
    return make_call(name, arguments)


def _skip_space(text: str, at: int) -> int:
    while at < len(text) and text[at].isspace():
        at += 1
    return at


def _value(text: str) -> Any:
    """A JSON value, which may be `null`; _MISSING if invalid."""
    if text.strip() == "null":
        return None
    value = read_json(text)
    return _MISSING if value is None else value


def _attributes(text: str) -> dict[str, str]:
    """Parses `name="f" string="true"`; values contain no quotes."""
    parts = text.split('"')
    return {key.strip().removesuffix("=").strip(): value for key, value in zip(parts[::2], parts[1::2], strict=False)}


def _format(name: str, at: int) -> ShapedFormat:
    return ShapedFormat(
        name=name,
        markers=(*_OPENS, *_CLOSES, INVOKE, INVOKE_END, _PARAMETER, _PARAMETER_END, MARK),
        shape=CallShape(
            begin=f"{_OPENS[at]}\n",
            before=f'{INVOKE} name="',
            between='">\n',
            after=f"{INVOKE_END}\n",
            end=_CLOSES[at],
            trigger=_OPENS[at],
            parameters=ParameterShape(
                before=f'{_PARAMETER} name="',
                between='" string="true">',
                json_between='" string="false">',
                after=f"{_PARAMETER_END}\n",
            ),
        ),
        free=lambda tools: MarkedCallParser(INVOKE, INVOKE_END, read, (*_OPENS, *_CLOSES), _CLOSES, end_optional=False),
    )


V32, V4 = _format("dsml", 0), _format("dsml_v4", 1)
