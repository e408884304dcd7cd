"""The protocol of tool call formats, and the parser shared by all formats that mark calls.

A format defines the strings around a call and how to read its text. The parser finds calls in a stream. Unless a grammar
enforces calls (see `enforced`), a call is emitted only when it is complete and valid, since a broken call must never look
executable. Until then its text is held back; if it is invalid, all of it becomes content, so that nothing is lost.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeAlias

from ...engine.grammar.calls import CallShape
from ...engine.grammar.source import GrammarSource
from ..deltas import ContentDelta, Delta, OutputParser, ToolCallDelta
from ..scan import MarkerScanner

Tools: TypeAlias = Mapping[str, Mapping[str, Any]]  # name -> JSON schema of the arguments
Enforced: TypeAlias = Literal[
    "no", "auto", "required"
]  # calls that a grammar enforces: none, those that begin, or at least one

_MAX_NAME = 256  # characters


class ToolFormat(Protocol):
    """A format of tool calls. Formats are stateless; their parsers have state."""

    @property
    def name(self) -> str: ...

    @property
    def markers(self) -> tuple[str, ...]:
        """The strings around calls. If one is a special token, it must not be skipped when decoding."""

    @property
    def shape(self) -> CallShape | None:
        """How calls are written, to describe it to a model whose template does not; None: it cannot be described by a shape."""

    def source(
        self, tools: Sequence[Mapping[str, Any]], choice: str, parallel: bool, form: GrammarSource | None
    ) -> GrammarSource | None:
        """The grammar of answers; arguments, result and errors as of `tools_source`."""

    def parser(self, tools: Tools, enforced: Enforced = "no") -> OutputParser:
        """A parser for one answer.

        Args:
            tools: that may be called.
            enforced: whether the answer follows the grammar of `source`, with this choice.
        """


@dataclass(frozen=True)
class Call:
    """A tool call; `arguments` is the text of a JSON object."""

    name: str
    arguments: str


def read_json(text: str) -> Any:
    """The value of JSON text; None if it is not valid JSON, which excludes NaN, infinities and text nested too deeply."""
    try:
        return json.loads(text, parse_constant=_refuse, parse_float=_finite)
    except (ValueError, RecursionError):
        return None


def write_json(value: Any) -> str:
    """A value as JSON text. Characters are not escaped, except if there are lone surrogates, which cannot be encoded."""
    text = json.dumps(value, ensure_ascii=False)
    return text if encodable(text) else json.dumps(value)


def encodable(text: str) -> bool:
    """Whether a text has no lone surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def make_call(name: Any, arguments: Any) -> Call | None:
    """A call; None if the name or the arguments are invalid.

    Args:
        name: of the tool.
        arguments: a dict, or the JSON text of one; None: no arguments.
    """
    if not isinstance(name, str) or not 0 < len(name) <= _MAX_NAME or not name.isprintable():
        return None
    if isinstance(arguments, str):
        arguments = read_json(arguments)
    elif arguments is None:
        arguments = {}
    if not isinstance(arguments, dict):
        return None
    try:
        return Call(name, write_json(arguments))
    except RecursionError:
        return None


def _refuse(name: str) -> None:
    raise ValueError(name)


def _finite(digits: str) -> float:
    value = float(digits)
    if value in (float("inf"), float("-inf")):
        raise ValueError(digits)
    return value


def new_id() -> str:
    """An unpredictable id for a call."""
    return f"call_{uuid.uuid4().hex[:24]}"


class CallWriter:
    """Produces deltas of calls and of the content around them. White space next to a call is layout and is dropped."""

    def __init__(self) -> None:
        self._calls = 0
        self._held: list[str] = []  # white space, and markers that are dropped if a call follows
        self._beside = False  # whether only layout has followed the last call

    @property
    def beside_call(self) -> bool:
        """Whether only layout has followed the last call."""
        return self._beside

    def layout(self, text: str) -> None:
        """A marker or white space: content only if it is not next to a call."""
        self._held.append(text)

    def text(self, text: str) -> list[Delta]:
        """Adds content."""
        self._held.append(text)
        if not text.strip():
            return []
        whole = "".join(self._held)
        if self._beside:
            whole = whole.lstrip()
        body = whole.rstrip()
        self._held, self._beside = [whole[len(body) :]] if len(body) < len(whole) else [], False
        return [ContentDelta(body)]

    def call(self, call: Call) -> list[Delta]:
        """Adds a complete call."""
        return [*self.begin(call.name), *self.fragment(call.arguments)]

    def begin(self, name: str) -> list[Delta]:
        """Begins a call, whose arguments follow."""
        self._calls, self._beside = self._calls + 1, True
        self._held.clear()
        return [ToolCallDelta(self._calls - 1, new_id(), name, "")]

    def fragment(self, arguments: str) -> list[Delta]:
        """Adds a part of the arguments of the last call."""
        return [ToolCallDelta(self._calls - 1, None, None, arguments)] if arguments else []

    def finish(self) -> list[Delta]:
        """The remaining deltas."""
        text, self._held = "".join(self._held), []
        text = text.strip() if self._beside else text
        return [ContentDelta(text)] if text else []


class MarkedCallParser:
    """Parses calls between two strings.

    Args:
        begin, end: the strings around a call. "" for `end`: a call ends where the next one begins, or at the end of the answer.
        read: parses the text between them; None, or an empty list, if it is not a call.
        section: strings around groups of calls, which are layout.
        closes: those of them that may follow a call, and are then dropped immediately.
        end_optional: whether the last call of the answer may lack its end; only if `read` can distinguish a complete call from
            a truncated one.
    """

    def __init__(
        self,
        begin: str,
        end: str,
        read: Callable[[str], Call | list[Call] | None],
        section: tuple[str, ...] = (),
        closes: tuple[str, ...] = (),
        end_optional: bool = True,
    ) -> None:
        self._begin, self._end, self._read, self._end_optional = begin, end, read, end_optional
        self._section, self._closes = frozenset(section), frozenset(closes)
        self._scanner = MarkerScanner([marker for marker in (begin, end, *section) if marker])
        self._writer = CallWriter()
        self._call: list[str] | None = None  # text of the current call so far, without its markers

    def feed(self, text: str) -> list[Delta]:
        return [delta for is_marker, part in self._scanner.feed(text) for delta in self._take(is_marker, part)]

    def finish(self) -> list[Delta]:
        out = [delta for is_marker, part in self._scanner.finish() for delta in self._take(is_marker, part)]
        if self._call is not None and self._end_optional:
            out += self._close("")
        elif self._call is not None:
            out += self._writer.text(self._begin + "".join(self._call))
        return out + self._writer.finish()

    def _take(self, is_marker: bool, part: str) -> list[Delta]:
        if self._call is not None:
            if not is_marker or part not in (self._begin, self._end):
                self._call.append(part)
                return []
            if part == self._end:
                return self._close(part)
            if not self._end:
                out, self._call = self._close(""), []
                return out
            broken, self._call = self._begin + "".join(self._call), []  # another call starts inside this one
            return self._writer.text(broken)
        if is_marker and part == self._begin:
            self._call = []
            return []
        if is_marker and part in self._section:
            if not (self._writer.beside_call and part in self._closes):
                self._writer.layout(part)
            return []
        return self._writer.text(part)

    def _close(self, end: str) -> list[Delta]:
        body, self._call = "".join(self._call or ()), None
        calls = self._read(body)
        if not calls:
            return self._writer.text(self._begin + body + end)
        return [delta for call in (calls if isinstance(calls, list) else [calls]) for delta in self._writer.call(call)]
