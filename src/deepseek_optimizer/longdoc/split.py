"""Splits a document into overlapping chunks of limited length in tokens, at headings and paragraphs.

Splits are planned several chunks ahead from token counts of short segments (`TokenCounts`). Then each chunk is tokenized by
itself, which gives its exact count; a chunk that is too long is planned again, shorter.
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
MIN_LENGTH = 16  # tokens; one character can take several
_AHEAD = 16  # maximum number of chunks tokenized in one call, which uses several cores
_BATCH = 1 << 20  # characters of small files tokenized in one call
_SMALL = 8  # characters per token of a chunk: a longer file is unlikely to fit into one chunk
_SPARE = 128  # one token in this many is left free for tokens that the ends of a chunk add


@dataclass(frozen=True)
class Chunk:
    """
    Attributes:
        index: its index among the chunks of the document.
        file: index of its file.
        start, end: character positions in the file's text.
        tokens: number of tokens of text[start:end] tokenized by itself, without special tokens.
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
    """The chunks of a document, in order. Every character is in at least one, and none spans two files.

    Args:
        tokenizer: of Transformers, fast or slow.
        max_length: maximum tokens of a chunk, including special tokens (as the tokenizer's own `max_length`).
        stride: approximate overlap of consecutive chunks in tokens (as the tokenizer's own `stride`).
        progress: called with the number of characters done and the total.

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
    """Index of a file -> its number of tokens, for files that fit into one chunk. Counted in batches, since there may be
    many."""
    small = [number for number, file in enumerate(document.files) if 0 < len(file.text) <= _SMALL * limit]
    ends = accumulate(len(document.files[number].text) for number in small)
    fitting: dict[int, int] = {}
    for _, batch in groupby(zip(small, ends, strict=True), key=lambda pair: pair[1] // _BATCH):
        numbers = [number for number, _ in batch]
        counts = count(tokenizer, [document.files[number].text for number in numbers])
        fitting.update((number, tokens) for number, tokens in zip(numbers, counts, strict=True) if tokens <= limit)
    return fitting


class _Splitter:
    """Splits one file.

    Args:
        limit: maximum tokens of a chunk, without special tokens.
    """

    def __init__(self, file: TextFile, tokenizer: Any, limit: int, stride: int) -> None:
        self._name, self._text, self._headings = file.name, file.text, file.headings
        self._tokenizer, self._limit, self._stride = tokenizer, limit, stride
        self._counts = TokenCounts(tokenizer, file.text, segment=min(max(limit // 4, 32), 1024))

    def spans(self) -> Iterator[tuple[int, int, int]]:
        """(start, end, tokens) of each chunk."""
        start: int | None = 0 if self._text else None
        done, max_end, ahead = 0, len(self._text), 1
        while start is not None:
            planned = self._plan(start, done, max_end, ahead)
            counts = count(self._tokenizer, [self._text[first:end] for first, end, _ in planned])
            max_end, ahead = len(self._text), min(2 * ahead, _AHEAD)
            for (first, end, following), tokens in zip(planned, counts, strict=True):
                if tokens > self._limit:
                    start, max_end, ahead = first, self._shorter(first, end, tokens), 1
                    if max_end <= done:  # it would lie entirely in the previous chunk
                        start, max_end = done, len(self._text)
                    break
                yield first, end, tokens
                start, done = following, end

    def _plan(self, start: int, done: int, max_end: int, ahead: int) -> list[tuple[int, int, int | None]]:
        """(start, end, start of the next or None) of the next chunks.

        Args:
            done, max_end: the first one ends after `done`, the end of the previous chunk, and at `max_end` or before.
            ahead: maximum number of chunks.
        """
        planned: list[tuple[int, int, int | None]] = []
        following: int | None = start
        while following is not None and len(planned) < ahead:
            start, end = following, self._end(following, done, max_end)
            following = self._next(start, end) if end < len(self._text) else None
            planned.append((start, end, following))
            done, max_end = end, len(self._text)
        return planned

    def _end(self, start: int, done: int, max_end: int) -> int:
        before, aim = self._counts.before(start), self._limit - self._limit // _SPARE
        if self._counts.total - before <= aim and max_end == len(self._text):
            return max_end
        high = min(max(self._counts.character(before + aim), done + 1), max_end)
        return self._border(done, 0.75 * self._counts.before(high) + 0.25 * before, high)

    def _next(self, start: int, end: int) -> int:
        """The start of the chunk after text[start:end]."""
        at_end = self._counts.before(end)
        # A chunk that had to be shortened also overlaps less with the next one.
        shared = min(self._stride, (at_end - self._counts.before(start)) * self._stride / self._limit * 4 / 3)
        if shared < 1:
            return end
        high = min(max(self._counts.character(at_end - shared), start + 1), end)
        return self._border(start, at_end - 1.25 * shared, high)

    def _border(self, minimum: int, tokens: float, high: int) -> int:
        """The best position to split at after about `tokens` tokens, in minimum < position <= high."""
        low = min(max(self._counts.character(tokens), minimum), high - 1)
        return last_border(self._text, self._headings, low, high)

    def _shorter(self, start: int, end: int, tokens: int) -> int:
        """The maximum end of text[start:end], which has too many tokens."""
        if end - start == 1:
            raise ConfigError(
                f"max_length: a chunk cannot hold even one character: {self._text[start]!r} of {self._name} takes {tokens} "
                "tokens; use a larger max_length"
            )
        return start + min(max(int(0.98 * (end - start) * self._limit / tokens), 1), end - start - 1)


def _check(tokenizer: Any, max_length: int, stride: int) -> int:
    """The maximum tokens of a chunk without special tokens."""
    for name, value in (("max_length", max_length), ("stride", stride)):
        if not isinstance(value, int) or isinstance(value, bool):
            raise ConfigError(f"{name}: must be a whole number of tokens, got {value!r}")
    limit = max_length - tokenizer.num_special_tokens_to_add()
    if limit < MIN_LENGTH:
        raise ConfigError(f"max_length: must be at least {max_length - limit + MIN_LENGTH}, got {max_length}")
    if not 0 <= stride <= limit // 2:
        raise ConfigError(
            f"stride: must be from 0 to {limit // 2}, half of a chunk, got {stride}; with more, text would be read three times"
        )
    return limit
