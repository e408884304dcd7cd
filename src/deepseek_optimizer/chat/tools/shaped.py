"""A format that a `CallShape` describes: its grammar, and its parsers with and without that grammar."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ...engine.grammar.calls import CallShape, tools_source
from ...engine.grammar.source import GrammarSource
from ..deltas import OutputParser
from .base import Enforced, Tools
from .enforced import EnforcedCallParser


@dataclass(frozen=True)
class ShapedFormat:
    """See `ToolFormat`.

    Attributes:
        free: creates the parser for answers without a grammar, which also accepts variants of the syntax.
    """

    name: str
    markers: tuple[str, ...]
    shape: CallShape
    free: Callable[[Tools], OutputParser]

    def source(
        self, tools: Sequence[Mapping[str, Any]], choice: str, parallel: bool, form: GrammarSource | None
    ) -> GrammarSource | None:
        return tools_source(tools, choice, self.shape, parallel, form)

    def parser(self, tools: Tools, enforced: Enforced = "no") -> OutputParser:
        if enforced == "no":
            return self.free(tools)
        return EnforcedCallParser(self.shape, tools, only_calls=enforced == "required")
