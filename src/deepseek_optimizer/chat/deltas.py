"""The parsed output of a model: increments of content, of reasoning, and of tool calls."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol, TypeAlias


@dataclass(frozen=True)
class ContentDelta:
    """An increment of the answer's text, never empty."""

    text: str


@dataclass(frozen=True)
class ReasoningDelta:
    """An increment of the model's reasoning, never empty."""

    text: str


@dataclass(frozen=True)
class ToolCallDelta:
    """An increment of a tool call.

    Attributes:
        index: number of the call in the answer, from 0.
        id, name: in the first delta of a call; None in later ones.
        arguments: a fragment of JSON text; the fragments of a call concatenate to one JSON object.
    """

    index: int
    id: str | None
    name: str | None
    arguments: str


Delta: TypeAlias = ContentDelta | ReasoningDelta | ToolCallDelta


class OutputParser(Protocol):
    """Parses the text of one answer incrementally. The combined deltas do not depend on how the text is split."""

    def feed(self, text: str) -> list[Delta]:
        """The deltas that are certain after more text."""

    def finish(self) -> list[Delta]:
        """The remaining deltas; call it once, at the end."""


@dataclass(frozen=True)
class ToolCall:
    """A complete call; `arguments` is the text of a JSON object."""

    id: str
    name: str
    arguments: str


@dataclass(frozen=True)
class Parsed:
    """A complete answer. `content` is "" if the model only called tools, `reasoning` if it did not reason."""

    content: str
    reasoning: str
    tool_calls: tuple[ToolCall, ...]


def collect(deltas: Iterable[Delta]) -> Parsed:
    """Combines the deltas of an answer."""
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
