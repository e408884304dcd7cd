"""Quotations in an answer, and their occurrences in a text."""

from __future__ import annotations

import re
from collections.abc import Iterator

MAX_QUOTES, MAX_WORDS, MAX_PLACES = 32, 200, 50
LONG = 20  # characters from which a quotation is cited itself; a shorter one is cited with its sentence
MIN_SENTENCE = 20  # characters from which a sentence of the answer is treated as a possible quotation without quotation marks

_QUOTED = re.compile(
    r'"([^"\n]{3,}?)"|“([^”]{3,}?)”|„([^“”]{3,}?)[“”]|«([^»]{3,}?)»|「([^」]{2,}?)」|『([^』]{2,}?)』|`([^`\n]{3,}?)`'
    r"|(?<!\w)'([^'\n]{3,}?)'(?!\w)|‘([^’]{3,}?)’(?!\w)"
)
_GAP = re.compile(r"\s*(?:\.{3,}|…|\[(?:\.{3}|…)\])\s*")
_EDGES = " \t\n.,;:!?…"


def quotes(answer: str, sentences: list[str]) -> Iterator[str]:
    """Text in quotation marks, split at ellipses, and whole sentences, which may be quoted without marks.

    Long ones come first, and those with marks before those without.
    """
    candidates: dict[str, None] = {}
    for match in _QUOTED.finditer(answer):
        quoted = next(group for group in match.groups() if group is not None)
        for part in _GAP.split(quoted):
            candidates.setdefault(part.strip(_EDGES))
    for sentence in sentences:
        if len(sentence) >= MIN_SENTENCE:
            candidates.setdefault(sentence.strip(_EDGES))
    long_enough = [quote for quote in candidates if len(quote) >= 2]
    yield from sorted(long_enough, key=lambda quote: len(quote) < LONG)[:MAX_QUOTES]


def places(quote: str, text: str, start: int, end: int) -> list[tuple[int, int]]:
    """(start, end) of the first occurrences of a quotation in text[start:end], with any white space between its words.

    Occurrences that differ in case count only if there is none with the same case.
    """
    parts = quote.split()
    if not parts or len(parts) > MAX_WORDS:
        return []
    pattern = r"\s+".join(map(re.escape, parts))
    before, after = (r"\b" if edge.isalnum() else "" for edge in (quote[0], quote[-1]))
    for flags in (0, re.IGNORECASE):
        spans = []
        for match in re.compile(before + pattern + after, flags).finditer(text, start, end):
            spans.append(match.span())
            if len(spans) == MAX_PLACES:
                break
        if spans:
            return spans
    return []
