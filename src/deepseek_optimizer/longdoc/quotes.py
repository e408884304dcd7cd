"""What an answer quotes, and where a text has it."""

from __future__ import annotations

import re
from collections.abc import Iterator

MAX_QUOTES, MAX_WORDS, MAX_PLACES = 32, 200, 50
LONG = 20  # characters of a quotation that is a passage by itself; of a shorter one, its sentence is
LEAST_SENTENCE = 20  # characters of a sentence of the answer that counts as a quotation though it is not in quotation marks

_QUOTED = re.compile(
    r'"([^"\n]{3,}?)"|“([^”]{3,}?)”|„([^“”]{3,}?)[“”]|«([^»]{3,}?)»|「([^」]{2,}?)」|『([^』]{2,}?)』|`([^`\n]{3,}?)`'
    r"|(?<!\w)'([^'\n]{3,}?)'(?!\w)|‘([^’]{3,}?)’(?!\w)"
)
_GAP = re.compile(r"\s*(?:\.{3,}|…|\[(?:\.{3}|…)\])\s*")
_EDGES = " \t\n.,;:!?…"


def quotes(answer: str, sentences: list[str]) -> Iterator[str]:
    """What stands in quotation marks, without the ellipses in it, and whole sentences, should they be quoted without marks.

    Long ones come first, those with marks before those without.
    """
    found: dict[str, None] = {}
    for match in _QUOTED.finditer(answer):
        quoted = next(group for group in match.groups() if group is not None)
        for part in _GAP.split(quoted):
            found.setdefault(part.strip(_EDGES))
    for sentence in sentences:
        if len(sentence) >= LEAST_SENTENCE:
            found.setdefault(sentence.strip(_EDGES))
    told = [quote for quote in found if len(quote) >= 2]
    yield from sorted(told, key=lambda quote: len(quote) < LONG)[:MAX_QUOTES]


def places(quote: str, text: str, start: int, end: int) -> list[tuple[int, int]]:
    """(start, end) of the first places in text[start:end] that have a quotation, with any white space between its words.

    Places with other capital letters count only where there is none with the same.
    """
    parts = quote.split()
    if not parts or len(parts) > MAX_WORDS:
        return []
    pattern = r"\s+".join(map(re.escape, parts))
    before, behind = (r"\b" if edge.isalnum() else "" for edge in (quote[0], quote[-1]))
    for flags in (0, re.IGNORECASE):
        found = []
        for match in re.compile(before + pattern + behind, flags).finditer(text, start, end):
            found.append(match.span())
            if len(found) == MAX_PLACES:
                break
        if found:
            return found
    return []
