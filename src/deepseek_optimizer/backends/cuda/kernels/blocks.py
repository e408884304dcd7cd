"""Block-sparse attention: summaries of full blocks of keys, and the choice of the blocks that each row attends to.

A summary has the largest and the smallest elements of a block's keys, and is made when the last token of the block is written.
So a choice reads as much as two keys, and not 32. `graph/ops/attention.py` (op `block_choose`) defines the choice, which
`indexer.choose_best` makes for each row and key head. Source: Tang et al. 2024 (Quest).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..division import rows_at_once
from .codes import kind_of, numbers_of
from .indexer import choose_best
from .paged import scales_of
from .precision import add_product
from .rope import store_as

_BLOCKS = 64  # of a program of `estimate_blocks`
_SCORES = 256  # that a program reads at a time
_CHOSEN = 1024  # as `indexer`


@triton.jit
def summaries_of(cache, layer, KV_HEADS: tl.constexpr, HEAD: tl.constexpr, KIND: tl.constexpr):
    """Pointers to the summaries of a layer in blocks, [2, KV_HEADS, HEAD]: largest elements, then smallest. They have the
    cache's type, or bf16 beside codes.

    Args:
        layer: where the layer begins, in elements of the cache.
    """
    begin = layer + 2 * KV_HEADS * 32 * HEAD
    if KIND == "":
        return cache + begin
    else:
        return cache.to(tl.pointer_type(tl.bfloat16), bitcast=True) + (begin + 2 * KV_HEADS * 32 * 4) // 2


@triton.jit
def summarize_blocks(
    cache, slots, block_elements, layer_offset, KV_HEADS: tl.constexpr, HEAD: tl.constexpr, HEAD_BLOCK: tl.constexpr,
    KIND: tl.constexpr,
):  # fmt: skip
    """Writes the summaries of blocks whose last token was just written. Grid (rows, KV_HEADS).

    Args:
        cache: float32, bf16, or codes of a KIND [blocks, block_elements], see `store.CudaStore`.
        slots: int32 [rows], 32 * block + place of each row.
    """
    slot, head = tl.load(slots + tl.program_id(0)), tl.program_id(1)
    if slot % 32 != 31:
        return
    t, d = tl.arange(0, 32), tl.arange(0, HEAD_BLOCK)
    layer = (slot // 32).to(tl.int64) * block_elements + layer_offset
    place = cache + layer + (head * 32 + t)[:, None] * HEAD + d[None, :]
    keys = numbers_of(tl.load(place, mask=(d < HEAD)[None, :], other=0), KIND).to(tl.float32)
    if KIND != "":
        keys *= tl.load(scales_of(cache, layer, KV_HEADS, HEAD) + head * 32 + t)[:, None]
    target = summaries_of(cache, layer, KV_HEADS, HEAD, KIND) + head * HEAD + d
    store_as(target, tl.max(keys, 0), d < HEAD)
    store_as(target + KV_HEADS * HEAD, tl.min(keys, 0), d < HEAD)


def summarize(cache: torch.Tensor, slots: torch.Tensor, layer_offset: int, kv_heads: int, head: int) -> None:
    """See `summarize_blocks`."""
    summarize_blocks[(len(slots), kv_heads)](
        cache, slots, cache.stride(0), layer_offset, KV_HEADS=kv_heads, HEAD=head, HEAD_BLOCK=triton.next_power_of_2(head),
        KIND=kind_of(cache), num_warps=2,
    )  # fmt: skip


@triton.jit
def between(end, blocks, sinks, window):
    """The blocks [first, last) of a row that are chosen by their scores, and the number of blocks that it may see; (0, 0, n) if
    all of them can be chosen.

    Args:
        end: number of tokens that the row sees.
        blocks: number of blocks to choose.
    """
    count = (end + 31) // 32
    all_fit = count <= blocks
    return tl.where(all_fit, 0, (sinks + 31) // 32), tl.where(all_fit, 0, tl.maximum(end - window, 0) // 32), count


@triton.jit
def estimate_blocks(
    q, cache, block_tables, sequence, ends, estimates, block_elements, layer_offset, most_blocks, blocks, sinks, window,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, GROUP_ROWS: tl.constexpr, HEAD: tl.constexpr, HEAD_BLOCK: tl.constexpr,
    KIND: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """estimates[i, h, b] = sum over d of max(q_d largest_d, q_d smallest_d), for the blocks that a row chooses from; in fp32,
    since a choice should not depend on rounding. Grid (rows, KV_HEADS, blocks of these).

    Args:
        q: float32 [rows, KV_HEADS * GROUP * HEAD].
        cache: as of `summarize_blocks`. block_tables: int32 [S, most_blocks]. sequence, ends: int32 [rows].
        estimates: float32 [rows, KV_HEADS * GROUP, most_blocks].
        blocks, sinks, window: attributes of the op.
    """
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    first, last, _ = between(tl.load(ends + row), blocks, sinks, window)
    if (tl.program_id(2) * BLOCKS >= last) | ((tl.program_id(2) + 1) * BLOCKS <= first):
        return
    b, member, d = tl.program_id(2) * BLOCKS + tl.arange(0, BLOCKS), tl.arange(0, GROUP_ROWS), tl.arange(0, HEAD_BLOCK)
    wanted = (b >= first) & (b < last)
    page = tl.load(block_tables + tl.load(sequence + row) * most_blocks + b, mask=wanted, other=0).to(tl.int64)
    place = summaries_of(cache, page * block_elements + layer_offset, KV_HEADS, HEAD, KIND) + head * HEAD
    mask = (d < HEAD)[:, None] & wanted[None, :]
    largest = tl.load(place[None, :] + d[:, None], mask=mask, other=0.0).to(tl.float32)
    smallest = tl.load(place[None, :] + (KV_HEADS * HEAD + d)[:, None], mask=mask, other=0.0).to(tl.float32)
    own = (row * KV_HEADS + head) * GROUP + member
    rows = tl.load(q + own[:, None] * HEAD + d[None, :], mask=(member < GROUP)[:, None] & (d < HEAD)[None, :], other=0.0)
    total = tl.zeros([GROUP_ROWS, BLOCKS], tl.float32)
    total = add_product(total, tl.maximum(rows, 0.0), largest, False)
    total = add_product(total, tl.minimum(rows, 0.0), smallest, False)
    tl.store(estimates + own[:, None] * most_blocks + b[None, :], total, mask=(member < GROUP)[:, None] & wanted[None, :])


@triton.jit
def load_estimates(estimates, b, first, last, GROUP: tl.constexpr, GROUP_ROWS: tl.constexpr, stride):
    """Those of some blocks and the heads of a group, [GROUP_ROWS, BLOCK]; -inf where there are none."""
    member = tl.arange(0, GROUP_ROWS)
    mask = (member < GROUP)[:, None] & ((b >= first) & (b < last))[None, :]
    return tl.load(estimates + member[:, None] * stride + b[None, :], mask=mask, other=float("-inf"))


@triton.jit
def score_blocks(
    estimates, ends, scores, counts, most_blocks, blocks, sinks, window, KV_HEADS: tl.constexpr, GROUP: tl.constexpr,
    GROUP_ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """scores[i, k, b] = the largest estimate of the heads of key head k, each minus the head's largest; infinite for blocks
    that are always chosen. Grid (rows, KV_HEADS).

    Args:
        scores: float32 [rows, KV_HEADS, most_blocks]. counts: int32 [rows, KV_HEADS], number of scores.
    """
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    first, last, count = between(tl.load(ends + row), blocks, sinks, window)
    own = estimates + (row * KV_HEADS + head) * GROUP * most_blocks
    best = tl.full([GROUP_ROWS], float("-inf"), tl.float32)
    for start in range(0, last, BLOCK):
        part = load_estimates(own, start + tl.arange(0, BLOCK), first, last, GROUP, GROUP_ROWS, most_blocks)
        best = tl.maximum(best, tl.max(part, 1))
    best = tl.where(best == float("-inf"), 0.0, best)  # of heads that are not there: -inf - 0 is -inf, not NaN
    for start in range(0, count, BLOCK):
        b = start + tl.arange(0, BLOCK)
        part = load_estimates(own, b, first, last, GROUP, GROUP_ROWS, most_blocks)
        score = tl.where((b >= first) & (b < last), tl.max(part - best[:, None], 0), float("inf"))
        tl.store(scores + (row * KV_HEADS + head) * most_blocks + b, score, mask=b < count)
    tl.store(counts + row * KV_HEADS + head, count)


def choose(
    q: torch.Tensor,
    cache: torch.Tensor,
    layer_offset: int,
    block_tables: torch.Tensor,
    sequence: torch.Tensor,
    ends: torch.Tensor,
    chosen: torch.Tensor,
    *,
    heads: int,
    kv_heads: int,
    blocks: int,
    sinks: int,
    window: int,
) -> None:
    """See op `block_choose`; for as many rows at a time as a bounded memory holds.

    Args:
        q: float32 [T, heads * head].
        chosen: float32 [T, kv_heads * blocks].
    """
    tokens, most, head, group = len(q), block_tables.shape[1], q.shape[1] // heads, heads // kv_heads
    at_once = min(tokens, rows_at_once((heads + kv_heads) * most))
    estimates, scores = q.new_empty(at_once, heads, most), q.new_empty(at_once * kv_heads, most)
    counts = torch.empty(at_once * kv_heads, dtype=torch.int32, device=q.device)
    group_rows, choice = max(16, triton.next_power_of_2(group)), (blocks, sinks, window)
    for begin in range(0, tokens, at_once):
        rows = slice(begin, min(begin + at_once, tokens))
        count = rows.stop - begin
        estimate_blocks[(count, kv_heads, triton.cdiv(most, _BLOCKS))](
            q[rows], cache, block_tables, sequence[rows], ends[rows], estimates, cache.stride(0), layer_offset, most, *choice,
            KV_HEADS=kv_heads, GROUP=group, GROUP_ROWS=group_rows, HEAD=head,
            HEAD_BLOCK=max(16, triton.next_power_of_2(head)), KIND=kind_of(cache), BLOCKS=_BLOCKS, num_warps=4,
        )  # fmt: skip
        score_blocks[(count, kv_heads)](
            estimates, ends[rows], scores, counts, most, *choice, KV_HEADS=kv_heads, GROUP=group, GROUP_ROWS=group_rows,
            BLOCK=_SCORES, num_warps=4,
        )  # fmt: skip
        choose_best[(count * kv_heads,)](
            scores, counts, chosen[rows], most, EVERY=1, TOP_K=blocks, BLOCK=min(_CHOSEN, triton.next_power_of_2(most)),
            num_warps=4,
        )  # fmt: skip
