"""The words of a text in any script, for finding and comparing passages. There is no language setting and no stemming, but a
word that ends with -s, as plurals do in several languages, is also returned without it.

Case is ignored, and so are accents on Latin, Greek and Cyrillic letters. Identifiers are returned whole and in parts
(`max_length`: max, length; `readFile2`: read, file, 2), numbers whole and without commas. Scripts without spaces between words
are split into characters and pairs of characters, as search engines do.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator

import regex

_LIMIT = 64  # characters of a word; a line of base64 becomes several words
_WORD = regex.compile(rf"\p{{Nd}}{{1,{_LIMIT}}}(?:[.,]\p{{Nd}}{{1,{_LIMIT}}})+|[\p{{L}}\p{{M}}\p{{N}}_]{{1,{_LIMIT}}}")
_PART = regex.compile(r"\p{Lu}+(?=\p{Lu}\p{Ll})|\p{Lu}?[\p{Ll}\p{M}]+|\p{Lu}+|\p{N}+|[\p{Lo}\p{Lm}\p{Lt}\p{M}]+")
_UNSPACED = regex.compile(
    r"[\p{Han}\p{Hiragana}\p{Katakana}\p{Hangul}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}ー]+", flags=regex.VERSION1
)
_ACCENT = regex.compile("[\u0300-\u036f]")


def words(text: str) -> Iterator[str]:
    """The words of a text in order; parts follow the word they belong to."""
    cache: dict[str, tuple[str, ...]] = {}
    for match in _WORD.finditer(text):
        word = match[0]
        forms = cache.get(word)
        if forms is None:
            forms = cache[word] = tuple(form for one in _forms(word) for form in _with_singular(one))
        yield from forms


def _forms(word: str) -> Iterator[str]:
    if not word.isascii() and _UNSPACED.search(word):
        yield from _unspaced(unicodedata.normalize("NFKC", word))
        return
    folded = _fold(word)
    if folded.strip("_"):
        yield folded
    if "," in word:
        yield folded.replace(",", "")
    elif not (word.islower() and word.isalpha()) and "." not in word:
        parts = _PART.findall(word)
        if parts and parts != [word]:
            yield from map(_fold, parts)


def _with_singular(word: str) -> Iterator[str]:
    yield word
    if len(word) > 3 and word[-1] == "s" and word[-2] not in "sui":
        yield word[:-1]


def _unspaced(word: str) -> Iterator[str]:
    """Characters and pairs of characters of runs without spaces; other letters between them as words."""
    at = 0
    for run in _UNSPACED.finditer(word):
        if word[at : run.start()].strip("_"):
            yield _fold(word[at : run.start()])
        yield from run[0]
        yield from (run[0][i : i + 2] for i in range(len(run[0]) - 1))
        at = run.end()
    if word[at:].strip("_"):
        yield _fold(word[at:])


def _fold(word: str) -> str:
    if word.isascii():
        return word.lower()
    bare = _ACCENT.sub("", unicodedata.normalize("NFKD", word))
    return unicodedata.normalize("NFC", bare.casefold())
