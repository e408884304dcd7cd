"""Parses calls that a grammar enforces, and emits their arguments as they are written.

The text is exactly as a `CallShape` describes it, so that a call is certain as soon as its name is, and none of its text ever
becomes content. A call that is cut off, at the maximum length of the answer, keeps the arguments that were written.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

from ...engine.grammar.calls import CallShape, ParameterShape, Parts
from ..deltas import Delta
from ..scan import MarkerScanner
from .base import CallWriter, Tools, write_json
from .json_reader import JsonReader
from .parameters import only_text, typed

_NAME, _NAME_END = r"(?P<name>[A-Za-z0-9_.:-]{1,64}?)", "(?=[^A-Za-z0-9_.:-])"
_MIN_CUT_OFF = 3  # characters of the beginning of a call at the end of the answer that are not taken for text
_MAX_HEAD = 1024  # characters between calls and arguments; longer ones are not of this shape


class EnforcedCallParser:
    """See `OutputParser`.

    Args:
        shape: of the calls.
        tools: that may be called.
        only_calls: the answer has no other text.
    """

    def __init__(self, shape: CallShape, tools: Tools, only_calls: bool = False) -> None:
        self._tools, self._only_calls, self._writer = tools, only_calls, CallWriter()
        self._opener = shape.trigger or shape.begin + _literal(shape.before)
        head = _regex(shape.before) + _NAME + (_regex(shape.between) or _NAME_END)
        self._first, self._next = re.compile(re.escape(shape.begin) + head), re.compile(re.escape(shape.separator) + head)
        self._after = re.compile(_regex(shape.after))
        self._end = shape.end
        separated = bool(shape.separator.strip()) and not shape.end  # by text that is neither white space nor in a section
        self._markers = [self._opener, *([shape.separator] if separated else [])]
        self._scanner = MarkerScanner(self._markers)
        self._parameters = shape.parameters
        self._arguments: JsonReader | _ParameterReader | None = None  # of the current call
        self._step: Callable[[], list[Delta] | None] | None = None  # reads from the buffer; None: between calls
        self._buffer = ""

    def feed(self, text: str) -> list[Delta]:
        return [delta for is_marker, part in self._scanner.feed(text) for delta in self._take(is_marker, part)]

    def finish(self) -> list[Delta]:
        out: list[Delta] = []
        for is_marker, part in self._scanner.finish():
            cut_off = self._step is None and not is_marker and any(marker.startswith(part) for marker in self._markers)
            if not cut_off or not (self._only_calls or self._writer.beside_call or len(part) >= _MIN_CUT_OFF):
                out += self._take(is_marker, part)
        return out + self._writer.finish()

    def _take(self, is_marker: bool, part: str) -> list[Delta]:
        if self._step is None:
            if is_marker and part == self._opener:
                self._buffer, self._step = part, lambda: self._head(self._first)
            else:
                return [] if is_marker and self._writer.beside_call else self._writer.text(part)
        else:
            self._buffer += part
        out: list[Delta] = []
        while self._step is not None:
            deltas = self._step()
            if deltas is None:
                return out
            out += deltas
        rest, self._buffer = self._buffer, ""
        return out + (self._writer.text(rest) if rest else [])

    def _head(self, head: re.Pattern[str]) -> list[Delta] | None:
        match = head.match(self._buffer)
        if match is None:
            return self._waiting()
        self._buffer = self._buffer[match.end() :]
        name = match["name"]
        if self._parameters is None:
            self._arguments = JsonReader()
        else:
            self._arguments = _ParameterReader(self._parameters, self._tools.get(name, {}))
        self._step = self._argument
        return self._writer.begin(name)

    def _argument(self) -> list[Delta] | None:
        assert self._arguments is not None
        fragment, self._buffer = self._arguments.feed(self._buffer)
        out = self._writer.fragment(fragment)
        if self._arguments.ended or (not self._arguments.inside and self._after.match(self._buffer)):
            out += self._writer.fragment(self._arguments.close())
            self._step = self._tail
            return out
        return out or None

    def _tail(self) -> list[Delta] | None:
        match = self._after.match(self._buffer)
        if match is None:
            return self._waiting()
        self._buffer = self._buffer[match.end() :]
        self._step = self._between if self._end else None
        return []

    def _between(self) -> list[Delta] | None:
        """After a call in a section: its end, or another call."""
        if self._buffer.startswith(self._end):
            self._buffer, self._step = self._buffer[len(self._end) :], None
            return []
        return self._head(self._next)

    def _waiting(self) -> list[Delta] | None:
        """Waits for more text, unless there is too much that is not of this shape; then it is content."""
        if len(self._buffer) <= _MAX_HEAD:
            return None
        self._step = None
        return []


class _ParameterReader:
    """Writes parameters as a JSON object. Strings are passed on as they are written, other values when they are complete.

    Args:
        shape: of the parameters.
        schema: of the arguments.
    """

    def __init__(self, shape: ParameterShape, schema: Mapping[str, Any]) -> None:
        self._shape, self._schema = shape, schema
        start, name = _regex(shape.before), r"(?P<key>[^\"<>\n]{1,256}?)"
        self._head = re.compile(f"{start}{name}{_regex(shape.between)}")
        self._json_head = None
        if shape.json_between is not None:
            self._json_head = re.compile(f"{start}{name}{_regex(shape.json_between)}")
        self._written = 0  # number of parameters
        self._value: str | None = None  # text of the current value that has not been passed on; None: between parameters
        self._string = False  # whether the value is passed on as it is written
        self._key = ""
        self._is_json = False
        self.ended = False  # always: the text after the last parameter shows the end

    @property
    def inside(self) -> bool:
        """Whether a value has begun and not ended."""
        return self._value is not None

    def feed(self, text: str) -> tuple[str, str]:
        """(JSON text, text that is not used yet)."""
        out = ""
        while True:
            if self._value is None:
                head = self._head.match(text)
                is_json = False
                if head is None and self._json_head is not None:
                    head, is_json = self._json_head.match(text), True
                if head is None:
                    return out, text
                text = text[head.end() :]
                out += self._open(head["key"], is_json)
            value, ended, text = self._until_end(text)
            out += value
            if not ended:
                return out, text

    def close(self) -> str:
        return "}" if self._written else "{}"

    def _open(self, key: str, is_json: bool) -> str:
        self._key, self._is_json, self._value = key, is_json, ""
        exact = self._shape.json_between is not None
        self._string = not is_json if exact else only_text(self._schema, key)
        out = ("{" if self._written == 0 else ", ") + write_json(key) + ": " + ('"' if self._string else "")
        self._written += 1
        return out

    def _until_end(self, text: str) -> tuple[str, bool, str]:
        """(JSON text, whether the value has ended, text that is not used yet)."""
        assert self._value is not None
        end = self._shape.after
        at = text.find(end)
        if at < 0:
            keep = _overlap(text, end)
            ready, rest = text[: len(text) - keep], text[len(text) - keep :]
            if self._string:
                return _escaped(ready), False, rest
            self._value += ready
            return "", False, rest
        ready, rest = text[:at], text[at + len(end) :]
        if self._string:
            out = _escaped(ready) + '"'
        else:
            out = write_json(typed(self._value + ready, self._schema, self._key, is_json=self._is_json))
        self._value = None
        return out, True, rest


def _literal(parts: Parts) -> str:
    """The fixed text at the beginning."""
    first = parts if isinstance(parts, str) else parts[0]
    assert isinstance(first, str)
    return first


def _regex(parts: Parts) -> str:
    several = (parts,) if isinstance(parts, str) else parts
    return "".join(re.escape(part) if isinstance(part, str) else f"(?:{part.regex})" for part in several)


def _escaped(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)[1:-1]


def _overlap(text: str, marker: str) -> int:
    """Length of the longest end of a text that is the beginning of a marker."""
    longest = min(len(text), len(marker) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(marker[:n])), 0)
