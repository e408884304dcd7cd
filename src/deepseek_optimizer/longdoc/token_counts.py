"""Token counts of parts of a text, computed in short segments so that time and memory stay linear in its length.

A long word without spaces takes some tokenizers quadratic time, and a batch of long texts gigabytes. Segments end at word
boundaries if possible, so their sum is nearly the count of the whole text.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

_BATCH = 1 << 20  # characters tokenized in one call


def count(tokenizer: Any, texts: Sequence[str]) -> list[int]:
    """The number of tokens of each text by itself, without special tokens.

    Special tokens in a text are counted as ordinary text: a document never has the role of the system or a user.
    """
    if not texts:
        return []
    ids = tokenizer(
        list(texts), add_special_tokens=False, split_special_tokens=True, return_attention_mask=False, verbose=False
    )["input_ids"]
    return [len(row) for row in ids]


class TokenCounts:
    """Approximate number of tokens before each character of a text.

    Args:
        segment: maximum characters of a segment; within it, tokens are assumed to be spread evenly.
    """

    def __init__(self, tokenizer: Any, text: str, segment: int) -> None:
        ends, counts = [0], [0]
        for batch in _batches(segments(text, segment)):
            ends += [end for _, end in batch]
            counts += count(tokenizer, [text[start:end] for start, end in batch])
        self._characters = np.array(ends, dtype=np.int64)
        self._tokens = np.cumsum(counts, dtype=np.int64)

    @property
    def total(self) -> int:
        """Tokens of the whole text."""
        return int(self._tokens[-1])

    def before(self, character: int) -> float:
        """Tokens of text[:character]."""
        return float(np.interp(character, self._characters, self._tokens))

    def character(self, tokens: float) -> int:
        """The position with this number of tokens before it."""
        return int(np.interp(tokens, self._tokens, self._characters))


def segments(text: str, size: int) -> Iterator[tuple[int, int]]:
    """(start, end) of segments of at most `size` characters that cover a text, split after a line or before a space if their
    second half contains one."""
    at = 0
    while len(text) - at > size:
        low, high = at + size // 2, at + size
        newline, space = text.rfind("\n", low, high) + 1, text.rfind(" ", low + 1, high)
        end = max(newline, space) if max(newline, space) > low else high
        yield at, end
        at = end
    if at < len(text):
        yield at, len(text)


def _batches(spans: Iterable[tuple[int, int]]) -> Iterator[list[tuple[int, int]]]:
    batch: list[tuple[int, int]] = []
    for span in spans:
        if batch and span[1] - batch[0][0] > _BATCH:
            yield batch
            batch = []
        batch.append(span)
    if batch:
        yield batch
