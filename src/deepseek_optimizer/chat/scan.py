"""Finds fixed strings in streamed text, independently of how it is split, in linear time."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator


class MarkerScanner:
    """Splits a stream into text and markers.

    An end that may be the start of a marker is held back until that is certain. If two markers start at the same position, the
    longer one is used.

    Args:
        markers: at least one, none empty.
    """

    def __init__(self, markers: Iterable[str]) -> None:
        longest_first = sorted(set(markers), key=len, reverse=True)
        self._any = re.compile("|".join(map(re.escape, longest_first)))  # an alternation of fixed strings cannot backtrack far
        self._prefixes = {marker[:n] for marker in longest_first for n in range(1, len(marker))}
        self._characters = frozenset("".join(self._prefixes))
        self._longest = len(longest_first[0])
        self._held = ""

    def feed(self, text: str) -> Iterator[tuple[bool, str]]:
        """(whether it is a marker, text) in order; texts are not empty."""
        text, self._held = self._held + text, ""
        at, keep = 0, self._tail(text, 0)
        parts = []
        for match in self._any.finditer(text):
            if match.start() >= keep:
                break  # it may be part of a longer marker
            parts += [(False, text[at : match.start()]), (True, match.group())]
            at = match.end()
            if at > keep:
                keep = self._tail(text, at)
        parts.append((False, text[at:keep]))
        self._held = text[keep:]
        return (part for part in parts if part[1])

    def finish(self) -> Iterator[tuple[bool, str]]:
        """The text held back, and the markers in it, since no longer marker can follow."""
        text, self._held = self._held, ""
        at, parts = 0, []
        for match in self._any.finditer(text):
            parts += [(False, text[at : match.start()]), (True, match.group())]
            at = match.end()
        parts.append((False, text[at:]))
        return (part for part in parts if part[1])

    def _tail(self, text: str, at: int) -> int:
        """The start of the longest end of text[at:] that may become a marker."""
        if text[-1:] in self._characters:
            for start in range(max(at, len(text) - self._longest), len(text)):
                if text[start:] in self._prefixes:
                    return start
        return len(text)
