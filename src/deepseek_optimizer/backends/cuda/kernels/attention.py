"""Attention over the paged cache, for prefill and decoding.

A step's rows are divided into tiles (`division.Tiles`): up to BLOCK_Q consecutive rows of one sequence. One program computes
one tile for the query heads that share a key head, so that keys and values are read once for all of them: BLOCK_Q * GROUP rows
of a product, of which tensor cores need at least 16. It goes through the visible blocks of 32 tokens, TOKENS / 32 at a time
(`paged.py`).

Scores and sums are fp32. With caches other than fp32, q and the softmax's weights are rounded to bf16 for products on tensor
cores; with an fp32 cache nothing is rounded, and half as many tokens are read at a time, as operands are in registers. Scales
of codes multiply scores and weights.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..division import TILE_FIELDS, Tiles
from .codes import kind_of, numbers_of
from .gates import tanh
from .paged import (
    blocks_to_read,
    chosen_tokens,
    chunk_memory,
    finish_tile,
    launch_merge,
    next_weights,
    rows_to_read,
    scales_of,
    seen_by_rows,
    seen_to_both_sides,
    tokens_to_read,
    with_sink,
)
from .precision import add_product, nearest_bf16

_FIELDS = tl.constexpr(TILE_FIELDS)
_LARGE_HEAD_ROWS = 32  # of a product, where sums of 64 rows do not fit into registers


@triton.jit
def attend_tile(
    q, cache, row_values, chosen, block_tables, tiles, ends, learned, out, partial, stats, block_elements, layer_offset,
    most_blocks, chunk_blocks, scale, softcap, window, sinks, CHUNKS: tl.constexpr, KV_HEADS: tl.constexpr, GROUP: tl.constexpr,
    GROUP_ROWS: tl.constexpr, HEAD: tl.constexpr, HEAD_BLOCK: tl.constexpr, BLOCK_Q: tl.constexpr, TOKENS: tl.constexpr,
    NARROW: tl.constexpr, SINKS: tl.constexpr, KIND: tl.constexpr, CHUNKED: tl.constexpr, CAUSAL: tl.constexpr,
    CAPPED: tl.constexpr, IN_STEP: tl.constexpr, CHOSEN: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """out = softmax(scale q K^T) V of a tile and a key head. Grid (tiles * PARTS, KV_HEADS, CHUNKS).

    Args:
        q, out: float32 [T, KV_HEADS * GROUP * HEAD].
        cache: float32, bf16, or codes of a KIND [blocks, block_elements], see `store.CudaStore`.
        row_values: read if IN_STEP: the step has all tokens of each sequence, there is no cache, and `cache` and `row_values`
            are the keys and values of its rows, float32 [T, KV_HEADS * HEAD]. Then rows see up to `window` tokens to either
            side, all if it is 0.
        chosen: float32 [T, KV_HEADS, CHOSEN], the blocks of the sequence that each row attends to, -1 after the last; read if
            CHOSEN > 0. Tiles have one row then.
        block_tables: int32 [S, most_blocks].
        tiles: see `division.Tiles`. ends: int32 [T], in tokens of the sequence.
        partial, stats: float32 [tiles, KV_HEADS, GROUP, CHUNKS, HEAD] and [.., 2], written instead of `out` if CHUNKS > 1, for
            `merge_chunks`.
        learned: float32 [KV_HEADS * GROUP], the score of one more key of each head, whose value is 0; read if SINKS.
        chunk_blocks: blocks of a chunk.
        softcap: if CAPPED, scores s become softcap * tanh(s / softcap).
        KIND: of codes, see `codes.kind_of`; "": keys and values are floats.
        CHUNKED: whether windows are chunks at fixed places.
        CAUSAL: whether rows see no token after their own, whatever `ends` says.
        GROUP_ROWS: a power of two >= GROUP; HEAD_BLOCK: one >= HEAD; BLOCK_Q * GROUP_ROWS >= 16.
        PARTS: programs among which the rows of a tile are divided, BLOCK_Q rows for each; 1 if CHUNKS > 1.
    """
    tile, kv_head, chunk = tl.program_id(0) // PARTS, tl.program_id(1), tl.program_id(2)
    fields, skipped = tiles + tile * _FIELDS, tl.program_id(0) % PARTS * BLOCK_Q
    sequence, first_row, count = tl.load(fields), tl.load(fields + 1) + skipped, tl.load(fields + 2) - skipped
    first_token, last_end = tl.load(fields + 3) + skipped, tl.load(fields + 4)
    if PARTS > 1:
        count = tl.minimum(count, BLOCK_Q)
        last_end = tl.where(count > 0, last_end, 0)
    i = tl.arange(0, BLOCK_Q * GROUP_ROWS)
    query, member = i // GROUP_ROWS, i % GROUP_ROWS
    real = (query < count) & (member < GROUP)
    token = first_token + query
    if CAUSAL:
        end = tl.where(real, token + 1, 0)
    else:
        end = tl.load(ends + first_row + query, mask=real, other=0)
    d = tl.arange(0, HEAD_BLOCK)
    q_place = ((first_row + query).to(tl.int64) * KV_HEADS + kv_head) * (GROUP * HEAD) + member * HEAD
    q_mask = real[:, None] & (d < HEAD)[None, :]
    rows = tl.load(q + q_place[:, None] + d[None, :], mask=q_mask, other=0.0)
    if NARROW:
        rows = nearest_bf16(rows)

    if IN_STEP:
        blocks, first_block, last_end = rows_to_read(first_token, count, last_end, window)
        sink_blocks = 0
    elif CHOSEN > 0:
        blocks = tl.minimum(CHOSEN, (last_end + 31) // 32)
        own = chosen + (first_row.to(tl.int64) * KV_HEADS + kv_head) * CHOSEN
    else:
        blocks, sink_blocks, first_block = blocks_to_read(first_token, last_end, window, sinks, CHUNKED)
    begin = chunk * chunk_blocks
    stop = tl.minimum(begin + chunk_blocks, blocks)

    maximum = tl.full([BLOCK_Q * GROUP_ROWS], float("-inf"), tl.float32)
    weights = tl.zeros([BLOCK_Q * GROUP_ROWS], tl.float32)
    sums = tl.zeros([BLOCK_Q * GROUP_ROWS, HEAD_BLOCK], tl.float32)
    pages = block_tables + sequence * most_blocks
    for start in range(begin * 32, stop * 32, TOKENS):
        t = start + tl.arange(0, TOKENS)
        if IN_STEP:
            key = first_block * 32 + t
            stored = key < last_end
            place = ((first_row - first_token + key).to(tl.int64) * KV_HEADS + kv_head) * HEAD
        else:
            if CHOSEN > 0:
                key, page, stored = chosen_tokens(t, stop, own, last_end, pages)
            else:
                key, page, stored = tokens_to_read(t, stop, sink_blocks, first_block, last_end, pages)
            place = page * block_elements + layer_offset + (kv_head * 32 + t % 32) * HEAD
        k = tl.load(cache + place[None, :] + d[:, None], mask=stored[None, :] & (d < HEAD)[:, None], other=0)
        scores = tl.zeros([BLOCK_Q * GROUP_ROWS, TOKENS], tl.float32)
        scores = add_product(scores, rows, numbers_of(k, KIND), NARROW) * scale  # bf16 holds what codes stand for exactly
        if KIND != "":
            scales = scales_of(cache, page * block_elements + layer_offset, KV_HEADS, HEAD) + kv_head * 32 + t % 32
            scores *= tl.load(scales, mask=stored, other=0.0)[None, :]
        if CAPPED:
            scores = softcap * tanh(scores / softcap)
        if IN_STEP:
            seen = seen_to_both_sides(key, stored, token, end, window)
            values = row_values + place
        else:
            seen = seen_by_rows(key, stored, token, end, window, sinks, CHUNKED)
            values = cache + place + KV_HEADS * 32 * HEAD
        weight, fade, maximum, weights = next_weights(scores, seen, maximum, weights)
        v = tl.load(values[:, None] + d[None, :], mask=stored[:, None] & (d < HEAD)[None, :], other=0)
        if KIND != "":
            weight *= tl.load(scales + KV_HEADS * 32, mask=stored, other=0.0)[None, :]
        sums = add_product(sums * fade[:, None], weight, numbers_of(v, KIND), NARROW)
    if CHUNKS == 1:
        # Computed anew from what is loaded anew: kept from above, places would take registers all along the loop.
        row, number = tl.load(fields + 1, volatile=True) + skipped + query, tl.load(fields + 2, volatile=True) - skipped
        real = (query < number) & (member < GROUP)
        q_place = (row.to(tl.int64) * KV_HEADS + kv_head) * (GROUP * HEAD) + member * HEAD
        q_mask = real[:, None] & (d < HEAD)[None, :]
    if SINKS and CHUNKS == 1:
        sink = tl.load(learned + kv_head * GROUP + member, mask=real, other=0.0)
        maximum, weights, sums = with_sink(maximum, weights, sums, sink)
    part = ((tile.to(tl.int64) * KV_HEADS + kv_head) * GROUP + member) * CHUNKS + chunk
    place = q_place[:, None] + d[None, :]
    finish_tile(maximum, weights, sums, real, out, place, q_mask, d, part, partial, stats, CHUNKS, HEAD)


def attention(
    q: torch.Tensor,
    cache: torch.Tensor,
    layer_offset: int,
    block_tables: torch.Tensor,
    tiles: Tiles,
    ends: torch.Tensor,
    out: torch.Tensor,
    *,
    heads: int,
    kv_heads: int,
    scale: float,
    window: int = 0,
    sinks: int = 0,
    softcap: float = 0.0,
    learned: torch.Tensor | None = None,
    chunked: bool = False,
    causal: bool = False,
    chosen: torch.Tensor | None = None,
) -> None:
    """See `attend_tile`. Rows of other tiles are not written."""
    count, head, group = len(tiles.fields), q.shape[1] // heads, heads // kv_heads
    most = 0 if chosen is None else chosen.shape[1] // kv_heads
    read, blocks = min(tiles.blocks, most) if most else tiles.blocks, block_tables.shape[1]
    chunks = tiles.division.chunks(tiles.planned, read, kv_heads)
    group_rows, narrow = triton.next_power_of_2(group), cache.dtype != torch.float32
    block_q = max(tiles.block_q, triton.cdiv(16, group_rows))
    head_block = max(16, triton.next_power_of_2(head))
    parts = _parts(block_q, group_rows) if head_block > 256 and chunks == 1 else 1
    block_q = max(block_q // parts, triton.cdiv(16, group_rows))
    tokens, warps = _sizes(block_q * group_rows, head_block, narrow)
    partial, stats = chunk_memory(tiles, heads, chunks, head, out)
    attend_tile[(count * parts, kv_heads, chunks)](
        q, cache, cache, q if chosen is None else chosen, block_tables, tiles.fields, ends, q if learned is None else learned,
        out, partial, stats, cache.stride(0), layer_offset, blocks, triton.cdiv(read, chunks) if chunks > 1 else blocks, scale,
        float(softcap), window, sinks, CHUNKS=chunks, KV_HEADS=kv_heads, GROUP=group, GROUP_ROWS=group_rows, HEAD=head,
        HEAD_BLOCK=head_block, BLOCK_Q=block_q, TOKENS=tokens, NARROW=narrow, SINKS=learned is not None, KIND=kind_of(cache),
        CHUNKED=chunked, CAUSAL=causal, CAPPED=softcap > 0, IN_STEP=False, CHOSEN=most, PARTS=parts, num_warps=warps,
        num_stages=2,
    )  # fmt: skip
    if chunks > 1:
        launch_merge(partial, stats, tiles, out, learned)


def step_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    tiles: Tiles,
    ends: torch.Tensor,
    out: torch.Tensor,
    *,
    heads: int,
    kv_heads: int,
    scale: float,
    window: int,
    narrow: bool,
) -> None:
    """Attention of rows to all tokens of their sequences, see `attend_tile` with IN_STEP. Rows of other tiles are not written.

    Args:
        ends: the number of tokens of each row's sequence.
        narrow: whether operands are rounded to bf16.
    """
    count, head, group = len(tiles.fields), q.shape[1] // heads, heads // kv_heads
    group_rows, head_block = triton.next_power_of_2(group), max(16, triton.next_power_of_2(head))
    tokens = 64 if narrow and head_block <= 64 else 16 if head_block > 128 else 32  # operands are in registers
    block_q = max(tiles.block_q, triton.cdiv(16, group_rows))
    parts = 1 if narrow or head_block <= 128 else _parts(block_q, group_rows)
    attend_tile[(count * parts, kv_heads, 1)](
        q, k, v, q, tiles.fields, tiles.fields, ends, q, out, out, out, 0, 0, 0, 1 << 26, scale, 0.0, window, 0, CHUNKS=1,
        KV_HEADS=kv_heads, GROUP=group, GROUP_ROWS=group_rows, HEAD=head, HEAD_BLOCK=head_block,
        BLOCK_Q=max(block_q // parts, triton.cdiv(16, group_rows)), TOKENS=tokens, NARROW=narrow, SINKS=False, KIND="",
        CHUNKED=False, CAUSAL=False, CAPPED=False, IN_STEP=True, CHOSEN=0, PARTS=parts,
        num_warps=8 if head_block > 64 or not narrow else 4, num_stages=2,
    )  # fmt: skip


def _parts(block_q: int, group_rows: int) -> int:
    """Programs for a tile whose heads are large."""
    return min(block_q, max(1, block_q * group_rows // _LARGE_HEAD_ROWS))


def _sizes(rows: int, head_block: int, narrow: bool) -> tuple[int, int]:
    """TOKENS and the number of warps: sums of `rows` rows must fit into registers, and keys and values into shared memory."""
    if not narrow:
        return 32, 8
    if head_block > 256:
        return 16, 8
    if head_block > 128 and rows > 32:
        return 32, 8  # a program of cards with compute capability 8.6 and 8.9 has 99 KiB
    return 64, 4 if rows * head_block <= 8192 else 8
