"""How kernels read packed matrices (`matrices.DeviceMatrix`).

A tile has 16 rows x 32 columns. It stores `words` times 16 words of 32 bits, [words][16 rows], each with `per_word` consecutive
columns of one row (`words * per_word` is 32), then 16 fp16 scales if the format has them. Kernels number the words of a row
j = 0, 1, ... over all its tiles: word j holds columns j * per_word + part, for part = 0 .. per_word - 1. A kernel reads words
without knowing the format, 16 rows of a word at a time (64 consecutive bytes), and `decode` gives the codes of one part; only
`decode` and `matrices.LAYOUTS` differ between formats.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def decode(words, part: tl.constexpr, FORMAT: tl.constexpr):
    """The codes of one part of each word as float32, exactly, without scales.

    Args:
        words: int32, any shape.
        part: 0 <= part < per_word.
    """
    if FORMAT == "fp32":
        return words.to(tl.float32, bitcast=True)
    elif FORMAT == "bf16":
        if part == 0:
            return (words << 16).to(tl.float32, bitcast=True)
        else:
            return (words & -65536).to(tl.float32, bitcast=True)
    elif FORMAT == "int8":
        return (((words >> (8 * part)) & 0xFF) - 128).to(tl.float32)
    else:
        tl.static_assert(FORMAT == "int4")  # low halves of the four bytes are columns 0 .. 3, high halves 4 .. 7
        return (((words >> (8 * (part % 4) + part // 4 * 4)) & 0xF) - 8).to(tl.float32)


@triton.jit
def word_place(tile_row, j, row, groups, WORDS: tl.constexpr, TILE_WORDS: tl.constexpr):
    """Index of word j of a row: `row` of 16 in a row of tiles. Arguments broadcast; int64, as matrices may exceed 2 GiB."""
    return (tile_row.to(tl.int64) * groups + j // WORDS) * TILE_WORDS + (j % WORDS) * 16 + row


@triton.jit
def scale_place(tile_row, j, row, groups, WORDS: tl.constexpr, TILE_WORDS: tl.constexpr):
    """Index, in halves, of the scale that belongs to word j of a row; arguments as in `word_place`."""
    return ((tile_row.to(tl.int64) * groups + j // WORDS) * TILE_WORDS + WORDS * 16) * 2 + row
