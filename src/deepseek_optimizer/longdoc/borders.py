"""Where to split a text: preferably at headings, else between paragraphs, lines, sentences, words, or characters."""

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
_MAX_GRAPHEME = 32  # code points of a grapheme cluster that is kept whole; longer ones are split


def last_border(text: str, headings: Sequence[int], low: int, high: int) -> int:
    """The last position of the best kind to split at, in low < position <= high.

    Args:
        headings: start positions of headings, ascending.
    """
    at = bisect_right(headings, high) - 1
    if at >= 0 and headings[at] > low:
        return headings[at]
    for pattern in (_BLANK, _LINE, _SENTENCE):
        place = _last(text, pattern, low, high)
        if place > low:
            return place
    space = text.rfind(" ", low + 1, high + 1)  # a space belongs to the following word, as in most tokenizers
    return space if space > low else _between_characters(text, low, high)


def sentences(text: str, start: int, end: int, max_length: int) -> list[tuple[int, int]]:
    """(start, end) of each sentence of text[start:end] without surrounding white space, none longer than `max_length`
    characters.

    A sentence ends at a full stop, at a blank line, or before a line that starts like a list item or a log entry. It continues
    over other line breaks, which may be those of a page layout.
    """
    spans, at = [], start
    for stop in [match.end() for match in _SENTENCE_OR_ITEM.finditer(text, start, end)] + [end]:
        while stop - at > max_length:
            cut = last_border(text, (), at + max_length // 2, at + max_length)
            spans.append((at, cut))
            at = cut
        spans.append((at, stop))
        at = stop
    stripped = (_strip(text, *span) for span in spans)
    return [span for span in stripped if span[0] < span[1]]


def _last(text: str, pattern: re.Pattern[str], low: int, high: int) -> int:
    """The end of the last occurrence in text[low:high]; -1 if there is none."""
    place = -1
    for match in pattern.finditer(text, low, high):
        place = match.end()
    return place


def _between_characters(text: str, low: int, high: int) -> int:
    """The last position up to `high` that does not split a grapheme cluster: a letter and its accents, or a composed emoji."""
    for place in range(high, max(low, high - _MAX_GRAPHEME), -1):
        if place == len(text) or not (_continues(text[place]) or text[place - 1] == _JOINER):
            return place
    return high


def _continues(character: str) -> bool:
    """Whether it belongs to the preceding character: accents, variation selectors, joiners, skin tones."""
    marks = unicodedata.category(character) in ("Mn", "Mc", "Me")
    return marks or character == _JOINER or "\U0001f3fb" <= character <= "\U0001f3ff"


def _strip(text: str, start: int, end: int) -> tuple[int, int]:
    while start < end and text[start].isspace():
        start += 1
    while end > start and text[end - 1].isspace():
        end -= 1
    return start, end
