"""Entries of compressed attention: what the tokens of a window are compressed to, element by element.

One program computes an entry: a softmax over the tokens of its window with a running maximum and sum for each element, the norm
of the sum, and a rotation. Its even and odd elements, which are rotated in pairs, are in two vectors. There is a program for
each row of a step, and those whose token does not complete an entry end at once, so that what is launched does not depend on
the tokens of a step. `graph/ops/compressed.py` has the formulas.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .angles import cos_and_sin
from .rope import store_as

_TOKENS = 8  # that a program reads at a time


@triton.jit
def next_sums(row, bias, inside, column, width, maximum, weights, sums, SERIES: tl.constexpr):
    """One step of the softmax of some elements over tokens.

    Args:
        row: pointers to the rows c, z of tokens, [TOKENS, 1].
        bias: pointers to the biases of these tokens, [TOKENS, 1]. inside: bool [TOKENS, ELEMENTS], of what is read.
        column: [ELEMENTS], elements of c. width: of an entry.

    Returns: the new maximum, sum of weights and sum.
    """
    c = tl.load(row + column[None, :], mask=inside, other=0.0).to(tl.float32)
    z = tl.load(row + SERIES * width + column[None, :], mask=inside, other=0.0).to(tl.float32)
    z = tl.where(inside, z + tl.load(bias + column[None, :], mask=inside, other=0.0), float("-inf"))
    top = tl.maximum(maximum, tl.max(z, 0))
    shift = tl.where(top == float("-inf"), 0.0, top)
    weight, fade = tl.exp(z - shift[None, :]), tl.exp(maximum - shift)
    return top, weights * fade + tl.sum(weight, 0), sums * fade + tl.sum(weight * c, 0)


@triton.jit
def compress_rows(
    cache, bias, norm, frequencies, ends, sequence, sources, targets, most_blocks, block_elements, source_offset, offset, eps,
    scaling, EVERY: tl.constexpr, SERIES: tl.constexpr, WIDTH: tl.constexpr, ROT: tl.constexpr, FIRST: tl.constexpr,
    TOKENS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Writes the entries whose last token is in the step; see op `compress`. Grid (rows).

    Args:
        cache: float32 or bf16 [blocks, block_elements], see `rows_store.CudaRowsStore`.
        bias: float32 [EVERY, SERIES * WIDTH]. norm: float32 [WIDTH]. frequencies: float32 [ROT // 2].
        ends: int32 [T], one past each row's token. sequence: int32 [T].
        sources, targets: int32 [S, most_blocks], blocks with the rows, and with the entries.
        source_offset, offset: where rows and entries begin in a block.
        SERIES: 2 if entries overlap, otherwise 1. FIRST: the first rotated element, an even number.
        BLOCK: a power of two >= WIDTH // 2.
    """
    end, of = tl.load(ends + tl.program_id(0)), tl.load(sequence + tl.program_id(0))
    if end % EVERY != 0:
        return
    entry = end // EVERY - 1
    j = tl.arange(0, BLOCK)
    paired = j < WIDTH // 2
    low_max = tl.full([BLOCK], float("-inf"), tl.float32)
    low_weights = tl.zeros([BLOCK], tl.float32)
    low_sums = tl.zeros([BLOCK], tl.float32)
    high_max, high_weights, high_sums = low_max, low_weights, low_sums
    for part in tl.static_range(SERIES):
        first = (entry + part - (SERIES - 1)) * EVERY  # with overlap, the tokens before those of the entry come first
        for start in range(0, EVERY, TOKENS):
            i = start + tl.arange(0, TOKENS)
            token = first + i
            real = (i < EVERY) & (token >= 0)
            page = tl.load(sources + of * most_blocks + token // 32, mask=real, other=0).to(tl.int64)
            place = page * block_elements + source_offset + token % 32 * (2 * SERIES * WIDTH)
            row, own = (cache + place)[:, None], (bias + i * (SERIES * WIDTH))[:, None]
            inside, column = real[:, None] & paired[None, :], part * WIDTH + 2 * j
            low_max, low_weights, low_sums = next_sums(row, own, inside, column, WIDTH, low_max, low_weights, low_sums, SERIES)
            high_max, high_weights, high_sums = next_sums(
                row, own, inside, column + 1, WIDTH, high_max, high_weights, high_sums, SERIES
            )
    low = tl.where(paired, low_sums / tl.where(paired, low_weights, 1.0), 0.0)
    high = tl.where(paired, high_sums / tl.where(paired, high_weights, 1.0), 0.0)
    divisor = tl.sqrt_rn((tl.sum(low * low, 0) + tl.sum(high * high, 0)) / WIDTH + eps)
    low = low / divisor * tl.load(norm + 2 * j, mask=paired, other=0.0)
    high = high / divisor * tl.load(norm + 2 * j + 1, mask=paired, other=0.0)
    pair = j - FIRST // 2
    turned = (pair >= 0) & (pair < ROT // 2)
    position = (entry * EVERY).to(tl.float32)
    angle = (position * tl.load(frequencies + pair, mask=turned, other=0.0)).to(tl.float64)
    cos, sin = cos_and_sin(angle)
    cos = tl.where(turned, (cos * scaling).to(tl.float32), 1.0)
    sin = tl.where(turned, (sin * scaling).to(tl.float32), 0.0)
    last = end - 1
    block = tl.load(targets + of * most_blocks + last // 32).to(tl.int64)
    place = cache + block * block_elements + offset + last % 32 // EVERY * WIDTH + 2 * j
    store_as(place, low * cos - high * sin, paired)
    store_as(place + 1, high * cos + low * sin, paired)


def compress(
    cache: torch.Tensor,
    bias: torch.Tensor,
    norm: torch.Tensor,
    frequencies: torch.Tensor,
    ends: torch.Tensor,
    sequence: torch.Tensor,
    sources: torch.Tensor,
    targets: torch.Tensor,
    source_offset: int,
    offset: int,
    *,
    overlap: bool,
    eps: float,
    scaling: float,
    first_rotated: int,
) -> None:
    """See `compress_rows`."""
    (every, _), width, rot = bias.shape, len(norm), 2 * frequencies.shape[-1]
    compress_rows[(len(ends),)](
        cache, bias, norm, frequencies, ends, sequence, sources, targets, sources.shape[1], cache.stride(0), source_offset,
        offset, eps, scaling, EVERY=every, SERIES=2 if overlap else 1, WIDTH=width, ROT=rot, FIRST=first_rotated,
        TOKENS=min(_TOKENS, triton.next_power_of_2(every)), BLOCK=triton.next_power_of_2(width // 2), num_warps=4,
    )  # fmt: skip
