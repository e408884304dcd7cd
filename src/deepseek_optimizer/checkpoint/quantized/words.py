"""Integers of 2, 4 or 8 bits packed into 32-bit words, the lowest bits first."""

from __future__ import annotations

import torch

BITS = (2, 4, 8)


def words_for(count: int, bits: int) -> int:
    """Number of words that hold `count` integers."""
    return -(-count * bits // 32)


def unpack_words(words: torch.Tensor, bits: int) -> torch.Tensor:
    """int32 [n, w] -> uint8 [n, w * 32 / bits]: the integers of each word in turn."""
    data = words.clone(memory_format=torch.contiguous_format).view(torch.uint8)  # `contiguous` may keep odd strides of size 1
    if bits == 8:
        return data
    mask = (1 << bits) - 1
    return torch.stack([(data >> shift) & mask for shift in range(0, 8, bits)], -1).flatten(1)


def lanes(begin: int, end: int, bits: int) -> tuple[int, int, int]:
    """For integers [begin, end) of a row: its first and last word (exclusive), and the first integer's place in them."""
    each = 32 // bits
    return begin // each, -(-end // each), begin % each
