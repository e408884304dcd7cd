"""Finding fixed strings in text that comes in pieces, whatever the pieces, in linear time."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator


class MarkerScanner:
    """Splits a stream into text and markers.

    A tail that may be the beginning of a marker is held back until it is known. Where two markers begin at one place, the
    longer one counts.

    Args:
        markers: at least one, none empty.
    """

    def __init__(self, markers: Iterable[str]) -> None:
        longest_first = sorted(set(markers), key=len, reverse=True)
        self._any = re.compile("|".join(map(re.escape, longest_first)))  # an alternation of fixed strings can't backtrack far
        self._prefixes = {marker[:n] for marker in longest_first for n in range(1, len(marker))}
        self._characters = frozenset("".join(self._prefixes))
        self._longest = len(longest_first[0])
        self._held = ""

    def feed(self, text: str) -> Iterator[tuple[bool, str]]:
        """(whether it is a marker, the text of it) in order; texts are not empty."""
        text, self._held = self._held + text, ""
        at, keep = 0, self._tail(text, 0)
        pieces = []
        for match in self._any.finditer(text):
            if match.start() >= keep:
                break  # it may be part of a longer marker
            pieces += [(False, text[at : match.start()]), (True, match.group())]
            at = match.end()
            if at > keep:
                keep = self._tail(text, at)
        pieces.append((False, text[at:keep]))
        self._held = text[keep:]
        return (piece for piece in pieces if piece[1])

    def finish(self) -> Iterator[tuple[bool, str]]:
        """What was held back: text, and markers in it, since no longer one came of it."""
        text, self._held = self._held, ""
        at, pieces = 0, []
        for match in self._any.finditer(text):
            pieces += [(False, text[at : match.start()]), (True, match.group())]
            at = match.end()
        pieces.append((False, text[at:]))
        return (piece for piece in pieces if piece[1])

    def _tail(self, text: str, at: int) -> int:
        """Where the longest end of text[at:] begins that may become a marker."""
        if text[-1:] in self._characters:
            for start in range(max(at, len(text) - self._longest), len(text)):
                if text[start:] in self._prefixes:
                    return start
        return len(text)
