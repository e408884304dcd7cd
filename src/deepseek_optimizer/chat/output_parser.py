"""Parses the text of a chat answer into reasoning, content and tool calls, with a chain of the parsers that its model needs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from .deltas import ContentDelta, Delta, OutputParser
from .reasoning import CLOSE, OPEN, ReasoningParser, opened_by, thinks
from .scan import MarkerScanner
from .tools import ToolFormat
from .tools.base import Enforced


def special_markers(tokenizer: Any, tool_format: ToolFormat | None) -> bool:
    """Whether the answer must be decoded with special tokens (`skip_special_tokens=False`), because tags or markers are among
    them.

    Args:
        tokenizer: of Transformers.
        tool_format: of a request with tools.
    """
    markers = {OPEN, CLOSE, *(tool_format.markers if tool_format else ())}
    return not markers.isdisjoint(tokenizer.all_special_tokens)


def make_output_parser(
    template: str,
    prompt: str,
    *,
    tool_format: ToolFormat | None = None,
    tools: Mapping[str, Mapping[str, Any]] | None = None,
    enforced: Enforced = "no",
    drop: Iterable[str] = (),
) -> OutputParser:
    """The parser for one answer.

    Args:
        template: the model's chat template, from which reasoning models are recognized.
        prompt: the rendered prompt, whose end may open the reasoning.
        tool_format: of a request whose tools may be called; None leaves calls in the content.
        tools: name -> JSON schema of the arguments, of its tools.
        enforced: whether a grammar enforces the calls.
        drop: special tokens to remove from the text, if it was decoded with them. Tags and markers are never removed.
    """
    stages: list[OutputParser] = []
    markers = set(tool_format.markers if tool_format else ())
    if thinks(template):
        markers |= {OPEN, CLOSE}
        stages.append(ReasoningParser(opened_by(prompt)))
    if tool_format is not None:
        stages.append(tool_format.parser(tools or {}, enforced))
    dropped = {token for token in drop if token and token not in markers}
    if dropped:
        stages.insert(0, Without(dropped))
    return Chain(stages)


class Without:
    """Removes strings from a text.

    Args:
        strings: the strings to remove.
    """

    def __init__(self, strings: Iterable[str]) -> None:
        self._scanner = MarkerScanner(strings)

    def feed(self, text: str) -> list[Delta]:
        return [ContentDelta(part) for dropped, part in self._scanner.feed(text) if not dropped]

    def finish(self) -> list[Delta]:
        return [ContentDelta(part) for dropped, part in self._scanner.finish() if not dropped]


class Chain:
    """A chain of parsers: each parses the content that the previous one returns.

    Args:
        stages: if empty, all text is content.
    """

    def __init__(self, stages: Sequence[OutputParser]) -> None:
        self._stages = stages

    def feed(self, text: str) -> list[Delta]:
        return self._through([ContentDelta(text)] if text else [], 0)

    def finish(self) -> list[Delta]:
        out: list[Delta] = []
        for at, stage in enumerate(self._stages):
            out += self._through(stage.finish(), at + 1)
        return out

    def _through(self, deltas: list[Delta], first: int) -> list[Delta]:
        for stage in self._stages[first:]:
            deltas = [d for delta in deltas for d in (stage.feed(delta.text) if isinstance(delta, ContentDelta) else [delta])]
        return deltas
