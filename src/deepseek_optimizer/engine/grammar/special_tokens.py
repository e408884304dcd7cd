"""Special tokens in the fixed texts of a structural tag.

Special tokens have no text in a grammar, so that an answer cannot contain them by accident. Where the syntax of a model
consists of them, such as `<|channel|>` and `[TOOL_CALLS]`, the grammar requires the token itself.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

from .calls import Format, sequence, text


class SpecialTokens:
    """
    Args:
        ids: text of each special token -> token id.
        stops: tokens that end an answer. They are left out of the grammar, whose end they mark anyway.
    """

    def __init__(self, ids: Mapping[str, int], stops: Iterable[int]) -> None:
        self._ids, self._stops = ids, frozenset(stops)
        longest_first = sorted((token for token in ids if token), key=len, reverse=True)
        self._any = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")

    def replaced(self, tag: str) -> str:
        """Returns a structural tag, as JSON, with the special tokens in its fixed texts as tokens."""
        value = json.loads(tag)
        return json.dumps({**value, "format": self._replaced(value["format"])}) if "format" in value else tag

    def _replaced(self, value: Any) -> Any:
        if isinstance(value, list):
            return [self._replaced(item) for item in value]
        if not isinstance(value, dict):
            return value
        kind = value.get("type")
        if kind == "const_string":
            return self._split(value["value"])
        if kind == "tag" and all(isinstance(value[end], str) for end in ("begin", "end")):
            if self._any.search(value["begin"]) or self._any.search(value["end"]):
                return sequence([self._split(value["begin"]), self._replaced(value["content"]), self._split(value["end"])])
        if kind == "dispatch" and all(pattern in self._ids for pattern, _ in value["rules"]):
            rules = [[self._ids[pattern], self._replaced(content)] for pattern, content in value["rules"]]
            return {"type": "token_dispatch", "rules": rules, "loop": value.get("loop", True)}
        if kind is None:  # a schema
            return value
        return {key: self._replaced(item) for key, item in value.items()}

    def _split(self, value: str) -> Format:
        out: list[Format] = []
        at = 0
        for match in self._any.finditer(value):
            token = self._ids[match.group()]
            out.append(text(value[at : match.start()]))
            if token not in self._stops:
                out.append({"type": "token", "token": token})
            at = match.end()
        return sequence([*out, text(value[at:])])
