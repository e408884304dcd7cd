"""How kernels read packed matrices (`matrices.DeviceMatrix`).

A tile has 16 rows x 32 columns. It stores `words` times 16 words of 32 bits, [words][16 rows], each with `per_word` consecutive
columns of one row, and then what else a format has: further bits of the codes, scales and minimums. Kernels number the words of
a row j = 0, 1, ... over all its tiles: word j holds columns j * per_word + part, for part = 0 .. per_word - 1. A kernel reads
the words of 16 rows at a time (64 consecutive bytes) with `load_codes`, and their scales with `load_scales`, without knowing
the format; `decode` gives the codes of one part. Only these functions and `layouts.LAYOUTS` differ between formats.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .codes import from_e4m3

# Tables of 16 values as bytes, four in a word: `quant.blocks.IQ4_VALUES` and `quant.trellis.VALUES`.
_IQ4_0, _IQ4_1 = tl.constexpr(-1079142271), tl.constexpr(-152379953)
_IQ4_2, _IQ4_3 = tl.constexpr(639175937), tl.constexpr(1901675829)
_TRELLIS_0, _TRELLIS_1 = tl.constexpr(-202446623), tl.constexpr(-197897)
_TRELLIS_2, _TRELLIS_3 = tl.constexpr(151389185), tl.constexpr(521671181)


@triton.jit
def tile_place(tile_row, j, groups, LAYOUT: tl.constexpr):
    """Index, in words, of the tile of word j in a row of tiles. Arguments broadcast; int64, as matrices may exceed 2 GiB."""
    first, tile = tile_row.to(tl.int64) * groups, j // LAYOUT.words
    if LAYOUT.head_words > 0:  # of superblocks of 8 tiles
        place = (first + tile // 8 * 8) * LAYOUT.tile_words + LAYOUT.head_words
        return place + tile % 8 * (LAYOUT.tile_words - LAYOUT.head_words // 8)
    else:
        return (first + tile) * LAYOUT.tile_words


@triton.jit
def load_codes(words, tile_row, j, row, groups, mask, LAYOUT: tl.constexpr):
    """Words j of rows, and what the second plane has of the same columns, shifted so that `decode` finds it; without a second
    plane the words twice. int32, of the shape that the arguments broadcast to.

    Args:
        tile_row, row: a row of tiles, and one of its 16 rows.
        groups: tiles in a row of tiles.
        mask: false where nothing is read.
    """
    place = words + tile_place(tile_row, j, groups, LAYOUT) + row
    low = tl.load(place + j % LAYOUT.words * 16, mask=mask, other=0)
    high = low
    if LAYOUT.codes == "trellis":
        high = subsets_of(tl.load(place + LAYOUT.words * 16, mask=mask, other=0), j % LAYOUT.words)
    elif LAYOUT.high > 0:
        quad = j % LAYOUT.words * (LAYOUT.per_word // 4)  # the first of 4 columns
        held = 8 // LAYOUT.high  # quads in a word of the second plane
        high = tl.load(place + (LAYOUT.words + quad // held) * 16, mask=mask, other=0) >> (quad % held * LAYOUT.high)
    return low, high


@triton.jit
def subsets_of(path, word):
    """The subset of each of the 16 columns of a word, two bits each, in the order in which `decode` reads them: those of column
    4 q + c at bits 8 c + (2, 0, 6, 4)[q].

    Args:
        path: the bits h of `quant.trellis`, of which column 4 q + c has number 8 c + (2, 0, 3, 1, 6, 4, 7, 5)[q].
        word: 0 or 1, columns 0 to 15 or 16 to 31.
    """
    unsigned = path.to(tl.uint32, bitcast=True)
    other = ((unsigned >> 1) | (unsigned << 31)) ^ ((unsigned << 3) | (unsigned >> 29))  # g: h[t + 1] ^ h[t - 3]
    even, odd = unsigned >> (word * 4), other >> (word * 4)  # two positions share two bits of h and two of g
    return ((even & 0x0F0F0F0F) | ((odd & 0x0F0F0F0F) << 4)).to(tl.int32, bitcast=True)


@triton.jit
def table_value(index, WORD_0: tl.constexpr, WORD_1: tl.constexpr, WORD_2: tl.constexpr, WORD_3: tl.constexpr):
    """Byte `index` of a table of 16 signed bytes, as float32."""
    word = tl.where(index < 8, tl.where(index < 4, WORD_0, WORD_1), tl.where(index < 12, WORD_2, WORD_3))
    return ((word << (24 - (index & 3) * 8)) >> 24).to(tl.float32)


@triton.jit
def load_scales(words, tile_row, j, row, groups, mask, LAYOUT: tl.constexpr):
    """The scales and minimums of words j of rows, float32; 1 and 0 where the format has none. Arguments as of `load_codes`."""
    scale = tl.full([1, 1], 1.0, tl.float32)
    minimum = tl.full([1, 1], 0.0, tl.float32)
    place = tile_place(tile_row, j, groups, LAYOUT)
    part = j % LAYOUT.words * LAYOUT.per_word // LAYOUT.group * 16 + row  # of the group of columns
    parts: tl.constexpr = 32 // LAYOUT.group * 16
    if LAYOUT.scale == "fp32":
        scale = tl.load(words + place + LAYOUT.code_words, mask=mask, other=0).to(tl.float32, bitcast=True)
    elif LAYOUT.scale == "fp16":
        halves = words.to(tl.pointer_type(tl.float16), bitcast=True) + (place + LAYOUT.code_words) * 2 + part
        scale = tl.load(halves, mask=mask, other=0.0).to(tl.float32)
        if LAYOUT.minimum:
            minimum = tl.load(halves + parts, mask=mask, other=0.0).to(tl.float32)
    elif LAYOUT.scale == "upper":
        numbers = words.to(tl.pointer_type(tl.uint8), bitcast=True) + (place + LAYOUT.code_words) * 4 + part
        scale = (tl.load(numbers, mask=mask, other=0).to(tl.int16) << 7).to(tl.float16, bitcast=True).to(tl.float32)
    elif LAYOUT.scale == "power":
        numbers = words.to(tl.pointer_type(tl.uint8), bitcast=True) + (place + LAYOUT.code_words) * 4 + part
        power = tl.load(numbers, mask=mask, other=0).to(tl.int32)
        bits = tl.where(power < 2, (power + 1) << 21, (power - 1) << 23)  # 2^-128 and 2^-127 are subnormal
        scale = bits.to(tl.float32, bitcast=True)
    elif LAYOUT.head_words > 0:
        numbers = words.to(tl.pointer_type(tl.int8), bitcast=True) + (place + LAYOUT.code_words) * 4 + part
        first = tile_row.to(tl.int64) * groups + j // LAYOUT.words // 8 * 8
        factors = words.to(tl.pointer_type(tl.float16), bitcast=True) + first * LAYOUT.tile_words * 2 + row
        number = tl.load(numbers, mask=mask, other=0).to(tl.int32)
        other = number
        if LAYOUT.scale == "nibbles":
            other = (number >> 4) & 15
            number = number & 15
        scale = number.to(tl.float32) * tl.load(factors, mask=mask, other=0.0).to(tl.float32)
        if LAYOUT.minimum:
            if LAYOUT.scale == "int8":
                other = tl.load(numbers + parts, mask=mask, other=0).to(tl.int32)
            minimum = other.to(tl.float32) * tl.load(factors + 16, mask=mask, other=0.0).to(tl.float32)
    return scale, minimum


@triton.jit
def decode(low, high, part: tl.constexpr, LAYOUT: tl.constexpr):
    """The codes of one part of each word as float32, exactly, without scales.

    Args:
        low, high: of `load_codes`.
        part: 0 <= part < per_word.
    """
    if LAYOUT.codes == "fp32":
        return low.to(tl.float32, bitcast=True)
    elif LAYOUT.codes == "bf16":
        if part == 0:
            return (low << 16).to(tl.float32, bitcast=True)
        else:
            return (low & -65536).to(tl.float32, bitcast=True)
    elif LAYOUT.codes == "e4m3":
        return from_e4m3(low >> (8 * (part % 2 * 2 + part // 2)))  # columns 0, 2, 1, 3 in turn
    elif LAYOUT.codes == "trellis":
        code = (low >> (8 * (part % 4) + part // 4 * 2)) & 3
        subset = (high >> (8 * (part % 4) + part // 8 * 4 + 2 - part // 4 % 2 * 2)) & 3  # at bits 2, 0, 6, 4 of a byte
        return table_value(code * 4 + subset, _TRELLIS_0, _TRELLIS_1, _TRELLIS_2, _TRELLIS_3)
    else:
        code = (low >> (8 * (part % 4) + part // 4 * LAYOUT.bits)) & ((1 << LAYOUT.bits) - 1)
        if LAYOUT.high > 0:
            above = (high >> (8 * (part % 4) + part // 4 * LAYOUT.high)) & ((1 << LAYOUT.high) - 1)
            code = code | (above << LAYOUT.bits)
        if LAYOUT.codes == "e2m1":  # as `from_e4m3`
            return (((code & 8) << 28) | ((code & 7) << 22)).to(tl.float32, bitcast=True) * 2.0**127
        elif LAYOUT.codes == "iq4":
            return table_value(code, _IQ4_0, _IQ4_1, _IQ4_2, _IQ4_3)
        else:
            tl.static_assert(LAYOUT.codes == "integer")
            return (code - LAYOUT.offset).to(tl.float32)
