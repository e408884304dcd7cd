"""What a model's text turns into on its way to a client: pieces of content, of reasoning, and calls of tools."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol, TypeAlias


@dataclass(frozen=True)
class ContentDelta:
    """More of the answer's text, never empty."""

    text: str


@dataclass(frozen=True)
class ReasoningDelta:
    """More of what the model thought before it answered, never empty."""

    text: str


@dataclass(frozen=True)
class ToolCallDelta:
    """More of a call.

    Attributes:
        index: which call of the answer, from 0.
        id, name: in a call's first delta; None in later ones.
        arguments: a piece of JSON text; a call's pieces concatenate to one JSON object.
    """

    index: int
    id: str | None
    name: str | None
    arguments: str


Delta: TypeAlias = ContentDelta | ReasoningDelta | ToolCallDelta


class OutputParser(Protocol):
    """Takes the text of one answer in pieces. However it is cut, the deltas add up to the same."""

    def feed(self, text: str) -> list[Delta]:
        """What is sure after another piece."""

    def finish(self) -> list[Delta]:
        """What was held back; once, at the end."""


@dataclass(frozen=True)
class ToolCall:
    """A whole call; `arguments` is the text of a JSON object."""

    id: str
    name: str
    arguments: str


@dataclass(frozen=True)
class Parsed:
    """A whole answer. `content` is "" where the model only called tools, `reasoning` where it did not think."""

    content: str
    reasoning: str
    tool_calls: tuple[ToolCall, ...]


def collect(deltas: Iterable[Delta]) -> Parsed:
    """The deltas of an answer put together."""
    content: list[str] = []
    reasoning: list[str] = []
    heads: dict[int, tuple[str, str]] = {}
    arguments: dict[int, list[str]] = {}
    for delta in deltas:
        if isinstance(delta, ContentDelta):
            content.append(delta.text)
        elif isinstance(delta, ReasoningDelta):
            reasoning.append(delta.text)
        else:
            if delta.id is not None and delta.name is not None:
                heads[delta.index] = delta.id, delta.name
            arguments.setdefault(delta.index, []).append(delta.arguments)
    calls = tuple(ToolCall(*heads[i], "".join(arguments[i])) for i in sorted(heads))
    return Parsed("".join(content), "".join(reasoning), calls)
