"""Llama 3: an answer that is one JSON object `{"name": ..., "parameters": {...}}`, or several separated by `;`.

`<|python_tag|>` may precede it. Nothing else marks a call, so an object counts as one only if it is at the start of the answer
(or after another call), has these two fields, and names a tool of the request.
"""

from __future__ import annotations

from ...engine.grammar.calls import CallShape
from ..deltas import Delta
from .base import Call, CallWriter, Tools, make_call, read_json
from .json_reader import JsonReader
from .shaped import ShapedFormat

PYTHON_TAG = "<|python_tag|>"
_SPACES = " \t\r\n"


class LlamaParser:
    """See `OutputParser`.

    Args:
        tools: that may be called.
    """

    def __init__(self, tools: Tools) -> None:
        self._tools, self._writer = tools, CallWriter()
        self._state = "between"  # "between" calls, after a "tag", in an "object", or "plain": no more calls
        self._held: list[str] = []  # of an incomplete tag or object
        self._object = JsonReader()

    def feed(self, text: str) -> list[Delta]:
        if self._held and self._state != "object":  # a few characters that may become the tag
            text = self._held.pop() + text
        out: list[Delta] = []
        at = 0
        while at < len(text):
            if self._state == "plain":
                return out + self._writer.text(text[at:])
            if self._state == "object":
                at, deltas = self._within(text, at)
                out += deltas
            else:
                at = self._before(text, at)
        return out

    def finish(self) -> list[Delta]:
        rest, self._held = "".join(self._held), []
        return (self._writer.text(rest) if rest else []) + self._writer.finish()

    def _before(self, text: str, at: int) -> int:
        """Reads up to the start of an object; returns the position to continue at."""
        begin = at
        spaces = _SPACES + ";" if self._writer.beside_call and self._state == "between" else _SPACES
        while at < len(text) and text[at] in spaces:
            at += 1
        if at > begin:
            self._writer.layout(text[begin:at])
        if at == len(text):
            return at
        if self._state == "between":
            if text.startswith(PYTHON_TAG, at):
                self._writer.layout(PYTHON_TAG)
                self._state = "tag"
                return at + len(PYTHON_TAG)
            if len(text) - at < len(PYTHON_TAG) and PYTHON_TAG.startswith(text[at:]):
                self._held.append(text[at:])
                return len(text)
        self._state = "object" if text[at] == "{" else "plain"
        return at

    def _within(self, text: str, at: int) -> tuple[int, list[Delta]]:
        """Reads up to the object's closing brace; returns the position to continue at."""
        part, after = self._object.feed(text[at:])
        self._held.append(part)
        if not self._object.ended:
            return len(text), []
        self._object = JsonReader()
        return len(text) - len(after), self._close()

    def _close(self) -> list[Delta]:
        whole, self._held = "".join(self._held), []
        call = read(whole)
        if call is None or call.name not in self._tools:
            self._state = "plain"
            return self._writer.text(whole)
        self._state = "between"
        return self._writer.call(call)


def read(text: str) -> Call | None:
    """Parses one object."""
    value = read_json(text)
    if not isinstance(value, dict):
        return None
    arguments = value.get("parameters", value.get("arguments"))
    return make_call(value.get("name"), arguments) if isinstance(arguments, (dict, str)) else None


LLAMA = ShapedFormat(
    name="llama",
    markers=(PYTHON_TAG,),
    shape=CallShape(before='{"name": "', between='", "parameters": ', after="}", separator="; "),
    free=LlamaParser,
)
