"""A document in chunks of so many tokens, cut along headings and paragraphs; each shares its beginning with the one before.

Cuts are planned by counts of short pieces (`TokenCounts`), some chunks ahead, and then each chunk is tokenised alone: its count
is exact, and a chunk that came out too long is planned again, shorter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import accumulate, groupby
from typing import Any

from ..errors import ConfigError
from .borders import last_border
from .document import Document, TextFile
from .token_counts import TokenCounts, count

MAX_LENGTH, STRIDE = 4096, 1024  # tokens
LEAST_LENGTH = 16  # tokens; one character can take several
_AHEAD = 16  # chunks that are tokenised in one call at most, which uses several cores
_BATCH = 1 << 20  # characters of small files that are tokenised in one call
_SMALL = 8  # characters for each token that a chunk may have: a longer file is hardly one chunk
_SPARE = 128  # one token in so many is left free for what a chunk's own ends add to the counts


@dataclass(frozen=True)
class Chunk:
    """
    Attributes:
        index: its place among the chunks of the document.
        file: index of the file that it is of.
        start, end: characters of the file's text.
        tokens: of text[start:end] tokenised alone, without those that a tokenizer adds.
    """

    index: int
    file: int
    start: int
    end: int
    tokens: int


def split(
    document: Document,
    tokenizer: Any,
    max_length: int = MAX_LENGTH,
    stride: int = STRIDE,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> list[Chunk]:
    """The chunks of a document, in order; every character lies in at least one, and none reaches over two files.

    Args:
        tokenizer: of Transformers, fast or slow.
        max_length: tokens of a chunk at most, those included that the tokenizer adds (as the tokenizer's own `max_length`).
        stride: tokens that a chunk shares with the one before, about (as the tokenizer's own `stride`).
        progress: called with how many characters are done, and how many there are.

    Raises:
        ConfigError: max_length or stride is out of range.
    """
    limit = _check(tokenizer, max_length, stride)
    chunks: list[Chunk] = []
    done, total = 0, document.characters
    whole = _whole(document, tokenizer, limit)
    for number, file in enumerate(document.files):
        fits = [(0, len(file.text), whole[number])] if number in whole else None
        for start, end, tokens in fits or _Splitter(file, tokenizer, limit, stride).spans():
            chunks.append(Chunk(len(chunks), number, start, end, tokens))
            if progress is not None:
                progress(done + end, total)
        done += len(file.text)
    return chunks


def _whole(document: Document, tokenizer: Any, limit: int) -> dict[int, int]:
    """Index of a file -> its tokens, of those files that fit into a chunk: counted together, since there may be very many."""
    small = [number for number, file in enumerate(document.files) if 0 < len(file.text) <= _SMALL * limit]
    ends = accumulate(len(document.files[number].text) for number in small)
    found: dict[int, int] = {}
    for _, batch in groupby(zip(small, ends, strict=True), key=lambda pair: pair[1] // _BATCH):
        numbers = [number for number, _ in batch]
        counts = count(tokenizer, [document.files[number].text for number in numbers])
        found.update((number, tokens) for number, tokens in zip(numbers, counts, strict=True) if tokens <= limit)
    return found


class _Splitter:
    """One file's chunks.

    Args:
        limit: tokens of a chunk at most, those not counted that the tokenizer adds.
    """

    def __init__(self, file: TextFile, tokenizer: Any, limit: int, stride: int) -> None:
        self._name, self._text, self._headings = file.name, file.text, file.headings
        self._tokenizer, self._limit, self._stride = tokenizer, limit, stride
        self._counts = TokenCounts(tokenizer, file.text, piece=min(max(limit // 4, 32), 1024))

    def spans(self) -> Iterator[tuple[int, int, int]]:
        """(start, end, tokens) of each chunk."""
        start: int | None = 0 if self._text else None
        done, most, ahead = 0, len(self._text), 1
        while start is not None:
            planned = self._plan(start, done, most, ahead)
            counts = count(self._tokenizer, [self._text[first:end] for first, end, _ in planned])
            most, ahead = len(self._text), min(2 * ahead, _AHEAD)
            for (first, end, following), tokens in zip(planned, counts, strict=True):
                if tokens > self._limit:
                    start, most, ahead = first, self._shorter(first, end, tokens), 1
                    if most <= done:  # all of it would stand in the chunk before
                        start, most = done, len(self._text)
                    break
                yield first, end, tokens
                start, done = following, end

    def _plan(self, start: int, done: int, most: int, ahead: int) -> list[tuple[int, int, int | None]]:
        """(start, end, start of the next or None) of some chunks.

        Args:
            done, most: the first ends behind `done`, where the one before ended, and at `most` at the latest.
            ahead: chunks at most.
        """
        planned: list[tuple[int, int, int | None]] = []
        following: int | None = start
        while following is not None and len(planned) < ahead:
            start, end = following, self._end(following, done, most)
            following = self._next(start, end) if end < len(self._text) else None
            planned.append((start, end, following))
            done, most = end, len(self._text)
        return planned

    def _end(self, start: int, done: int, most: int) -> int:
        before, aim = self._counts.before(start), self._limit - self._limit // _SPARE
        if self._counts.total - before <= aim and most == len(self._text):
            return most
        high = min(max(self._counts.character(before + aim), done + 1), most)
        return self._border(done, 0.75 * self._counts.before(high) + 0.25 * before, high)

    def _next(self, start: int, end: int) -> int:
        """Where the chunk behind text[start:end] begins."""
        behind = self._counts.before(end)
        # A chunk that had to be made shorter than the counts say also gives less of itself to the next.
        shared = min(self._stride, (behind - self._counts.before(start)) * self._stride / self._limit * 4 / 3)
        if shared < 1:
            return end
        high = min(max(self._counts.character(behind - shared), start + 1), end)
        return self._border(start, behind - 1.25 * shared, high)

    def _border(self, least: int, tokens: float, high: int) -> int:
        """The best place to cut that has so many tokens before it by the counts, and lies in least < place <= high."""
        low = min(max(self._counts.character(tokens), least), high - 1)
        return last_border(self._text, self._headings, low, high)

    def _shorter(self, start: int, end: int, tokens: int) -> int:
        """Where text[start:end], which has too many tokens, is to end at the latest."""
        if end - start == 1:
            raise ConfigError(
                f"max_length: a chunk cannot hold one character: {self._text[start]!r} of {self._name} takes {tokens} tokens"
            )
        return start + min(max(int(0.98 * (end - start) * self._limit / tokens), 1), end - start - 1)


def _check(tokenizer: Any, max_length: int, stride: int) -> int:
    """The tokens of a document's own in a chunk at most."""
    for name, value in (("max_length", max_length), ("stride", stride)):
        if not isinstance(value, int) or isinstance(value, bool):
            raise ConfigError(f"{name}: must be a whole number of tokens, got {value!r}")
    limit = max_length - tokenizer.num_special_tokens_to_add()
    if limit < LEAST_LENGTH:
        raise ConfigError(f"max_length: must be at least {max_length - limit + LEAST_LENGTH}, got {max_length}")
    if not 0 <= stride <= limit // 2:
        raise ConfigError(
            f"stride: must be from 0 to {limit // 2}, half of a chunk, got {stride}; with more, all would be read three times"
        )
    return limit
