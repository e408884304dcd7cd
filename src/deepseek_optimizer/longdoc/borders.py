"""Where a text may be cut: at headings best, else between paragraphs, lines, sentences, words, and else between characters."""

from __future__ import annotations

import re
import unicodedata
from bisect import bisect_right
from collections.abc import Sequence

_BLANK = re.compile(r"\n(?:[^\S\n]*\n)+")
_LINE = re.compile(r"\n")
_SENTENCE = re.compile(r"""[.!?…]["'”’»)\]]*\s+|[。！？｡]["'”’」』）]*\s*""")
_LISTED = r"\n(?=[^\S\n]*[-*•#|\d\[<{>$@+])"
_SENTENCE_OR_ITEM = re.compile(rf"{_SENTENCE.pattern}|{_BLANK.pattern}|{_LISTED}")
_JOINER = "\u200d"
_LONGEST_CHARACTER = 32  # code points of what a reader takes for one; a million accents on one letter are cut somewhere


def last_border(text: str, headings: Sequence[int], low: int, high: int) -> int:
    """The last of the best places to cut in low < place <= high: text[:place] and text[place:].

    Args:
        headings: where headings begin, ascending.
    """
    at = bisect_right(headings, high) - 1
    if at >= 0 and headings[at] > low:
        return headings[at]
    for pattern in (_BLANK, _LINE, _SENTENCE):
        place = _last(text, pattern, low, high)
        if place > low:
            return place
    space = text.rfind(" ", low + 1, high + 1)  # it stays with the word behind it, as in most tokenizers
    return space if space > low else _between_characters(text, low, high)


def sentences(text: str, start: int, end: int, most: int) -> list[tuple[int, int]]:
    """(start, end) of the sentences of text[start:end] without the white space around them, none longer than `most` characters.

    A sentence ends at a full stop, at a blank line, or before a line that begins as items of lists and entries of logs do; over
    other line ends it goes on, since they are a page's.
    """
    found, at = [], start
    for stop in [match.end() for match in _SENTENCE_OR_ITEM.finditer(text, start, end)] + [end]:
        while stop - at > most:
            cut = last_border(text, (), at + most // 2, at + most)
            found.append((at, cut))
            at = cut
        found.append((at, stop))
        at = stop
    stripped = (_strip(text, *piece) for piece in found)
    return [piece for piece in stripped if piece[0] < piece[1]]


def _last(text: str, pattern: re.Pattern[str], low: int, high: int) -> int:
    """Behind the last occurrence in text[low:high]; -1: there is none."""
    place = -1
    for match in pattern.finditer(text, low, high):
        place = match.end()
    return place


def _between_characters(text: str, low: int, high: int) -> int:
    """The last place up to `high` that does not part a letter from its accents, or an emoji from what it is made of."""
    for place in range(high, max(low, high - _LONGEST_CHARACTER), -1):
        if place == len(text) or not (_continues(text[place]) or text[place - 1] == _JOINER):
            return place
    return high


def _continues(character: str) -> bool:
    """Whether it belongs to the character before it: accents, variation selectors, joiners, skin tones."""
    marks = unicodedata.category(character) in ("Mn", "Mc", "Me")
    return marks or character == _JOINER or "\U0001f3fb" <= character <= "\U0001f3ff"


def _strip(text: str, start: int, end: int) -> tuple[int, int]:
    while start < end and text[start].isspace():
        start += 1
    while end > start and text[end - 1].isspace():
        end -= 1
    return start, end
