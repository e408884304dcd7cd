"""The lightning indexer: scores of all visible tokens, and the choice of the best.

A choice must be exact, down to ties, since every token that is missing is an error. So the smallest chosen score is found as a
number of 32 bits, from its highest bit to its lowest: a bit is 1 if enough scores are as large. Scores greater than it are
chosen, and of equal ones the first. One program chooses for one row, and reads its scores about 35 times, from the L2 cache.

Source: DeepSeek-V3.2, section 2.1.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..division import rows_at_once
from .precision import add_product

_TOKENS = 64  # of a program of `index_scores`
_BLOCK = 1024  # scores that a program of `choose_best` reads at a time


@triton.jit
def index_scores(
    q, weights, cache, block_tables, sequence, ends, scores, block_elements, index_offset, most_blocks, most_keys, scale,
    HEADS: tl.constexpr, HEAD_BLOCK: tl.constexpr, WIDTH: tl.constexpr, WIDTH_BLOCK: tl.constexpr, EVERY: tl.constexpr,
    TOKENS: tl.constexpr, NARROW: tl.constexpr,
):  # fmt: skip
    """scores[i, t] = scale * sum over h of weight_h relu(q_h . k_t), for the tokens t < ends[i], or the entries of EVERY tokens
    each that are complete there. Grid (rows, blocks of keys).

    Args:
        q: float32 [rows, HEADS * WIDTH]. weights: float32 [rows, HEADS].
        cache: float32 or bf16 [blocks, block_elements]; the keys of a block are `index_offset` elements after its begin.
        block_tables: int32 [S, most_blocks]. sequence, ends: int32 [rows].
        scores: float32 [rows, most_keys].
    """
    row, first = tl.program_id(0).to(tl.int64), tl.program_id(1) * TOKENS
    end = tl.load(ends + row) // EVERY
    if first >= end:
        return
    t, h, d = first + tl.arange(0, TOKENS), tl.arange(0, HEAD_BLOCK), tl.arange(0, WIDTH_BLOCK)
    stored = t < end
    last = (t + 1) * EVERY - 1
    page = tl.load(block_tables + tl.load(sequence + row) * most_blocks + last // 32, mask=stored, other=0).to(tl.int64)
    place = page * block_elements + index_offset + last % 32 // EVERY * WIDTH
    keys = tl.load(cache + place[None, :] + d[:, None], mask=stored[None, :] & (d < WIDTH)[:, None], other=0.0)
    mask = (h < HEADS)[:, None] & (d < WIDTH)[None, :]
    rows = tl.load(q + (row * HEADS + h[:, None]) * WIDTH + d[None, :], mask=mask, other=0.0)
    products = add_product(tl.zeros([HEAD_BLOCK, TOKENS], tl.float32), rows, keys, NARROW)
    weight = tl.load(weights + row * HEADS + h, mask=h < HEADS, other=0.0)
    total = tl.sum(tl.maximum(products, 0.0) * weight[:, None], 0) * scale
    tl.store(scores + row * most_keys + t, total, mask=stored)


@triton.jit
def ordered_bits(scores, t, end):
    """Scores as int64 numbers from 1 to 2^32 in the same order; 0 where there is none. -0 becomes 0, to which it is equal."""
    bits = (tl.load(scores + t, mask=t < end, other=0.0) + 0.0).to(tl.int32, bitcast=True)
    signed = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return tl.where(t < end, signed.to(tl.int64) + 2147483649, 0)


@triton.jit
def choose_best(scores, ends, chosen, most_keys, EVERY: tl.constexpr, TOP_K: tl.constexpr, BLOCK: tl.constexpr):
    """chosen[i] = the TOP_K tokens t < ends[i], or entries, with the largest scores, or all, ascending; -1 after the last. Grid
    (rows).

    Args:
        scores: float32 [rows, most_keys]. chosen: float32 [rows, TOP_K].
    """
    row, i = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    end, own, target = tl.load(ends + row) // EVERY, scores + row * most_keys, chosen + row * TOP_K
    smallest = tl.full([], 0, tl.int64)  # the largest number that TOP_K scores reach
    step = tl.full([], 4294967296, tl.int64)
    for _ in range(0, tl.where(end > TOP_K, 33, 0)):  # otherwise all are chosen
        reached = tl.zeros([BLOCK], tl.int32)
        for first in range(0, end, BLOCK):
            reached += (ordered_bits(own, first + i, end) >= smallest + step).to(tl.int32)
        smallest = tl.where(tl.sum(reached) >= TOP_K, smallest + step, smallest)
        step = step // 2
    greater = tl.zeros([BLOCK], tl.int32)
    for first in range(0, end, BLOCK):
        greater += (ordered_bits(own, first + i, end) > smallest).to(tl.int32)
    equals = TOP_K - tl.sum(greater)  # how many of the scores that are equal to the smallest are chosen
    placed, met = 0, 0
    for first in range(0, end, BLOCK):
        t = first + i
        number = ordered_bits(own, t, end)
        equal = ((number == smallest) & (t < end)).to(tl.int32)
        taken = ((number > smallest) | ((equal == 1) & (met + tl.cumsum(equal, 0) <= equals))).to(tl.int32)
        tl.store(target + placed + tl.cumsum(taken, 0) - 1, t.to(tl.float32), mask=taken == 1)
        placed += tl.sum(taken)
        met += tl.sum(equal)
    for first in range(0, TOP_K, BLOCK):
        tl.store(target + first + i, i * 0.0 - 1.0, mask=(first + i >= placed) & (first + i < TOP_K))


def choose(
    q: torch.Tensor,
    weights: torch.Tensor,
    cache: torch.Tensor,
    index_offset: int,
    block_tables: torch.Tensor,
    sequence: torch.Tensor,
    ends: torch.Tensor,
    chosen: torch.Tensor,
    scale: float,
    every: int = 1,
) -> None:
    """See `index_scores` and `choose_best`; for as many rows at a time as a bounded memory holds.

    Args:
        q: float32 [T, heads * width]. weights: float32 [T, heads].
        chosen: float32 [T, top_k].
        every: tokens of an entry; 1: keys are those of tokens.
    """
    (tokens, heads), most_blocks = weights.shape, block_tables.shape[1]
    width, keys = q.shape[1] // heads, triton.cdiv(32 * most_blocks, every)
    most = min(tokens, rows_at_once(keys))
    scores = torch.empty((most, keys), dtype=torch.float32, device=q.device)
    narrow = cache.dtype == torch.bfloat16
    read = _TOKENS if narrow else _TOKENS // 4  # operands of products in fp32 are in registers
    block = min(_BLOCK, triton.next_power_of_2(keys))
    for first in range(0, tokens, most):
        rows = slice(first, min(first + most, tokens))
        count = rows.stop - first
        index_scores[(count, triton.cdiv(keys, read))](
            q[rows], weights[rows], cache, block_tables, sequence[rows], ends[rows], scores, cache.stride(0), index_offset,
            most_blocks, keys, scale, HEADS=heads, HEAD_BLOCK=max(16, triton.next_power_of_2(heads)), WIDTH=width,
            WIDTH_BLOCK=max(16, triton.next_power_of_2(width)), EVERY=every, TOKENS=read, NARROW=narrow,
            num_warps=4 if narrow else 8,
        )  # fmt: skip
        choose_best[(count,)](
            scores, ends[rows], chosen[rows], keys, EVERY=every, TOP_K=chosen.shape[1], BLOCK=block, num_warps=8
        )  # fmt: skip
