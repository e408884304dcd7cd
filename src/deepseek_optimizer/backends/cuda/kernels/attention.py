"""Attention over the paged cache, for prefill and decoding.

A step's rows are divided into tiles (`division.Tiles`): up to BLOCK_Q consecutive rows of one sequence. One program computes
one tile for the query heads that share a key head, so that keys and values are read once for all of them: BLOCK_Q * GROUP rows
of a product, of which tensor cores need at least 16. It goes through the visible blocks of 32 tokens, TOKENS / 32 at a time,
with a running maximum and sum (Milakov and Gimelshein 2018, Dao et al. 2022).

Decoding has tiles of one row and hence few programs. With CHUNKS > 1, the blocks of a tile are divided among programs, whose
unfinished results go to memory, and `merge_chunks` combines them (Flash-Decoding, Dao et al. 2023).

Scores and sums are fp32. With a bf16 cache, q and the softmax's weights are rounded to bf16 for products on tensor cores; with
an fp32 cache nothing is rounded, and half as many tokens are read at a time, as operands are in registers.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..division import TILE_FIELDS, Tiles, chunks_of
from .precision import add_product

_FIELDS = tl.constexpr(TILE_FIELDS)


@triton.jit
def attend_tile(
    q, cache, block_tables, tiles, ends, out, partial, stats, block_elements, layer_offset, most_blocks, chunk_blocks, scale,
    window, sinks, CHUNKS: tl.constexpr, KV_HEADS: tl.constexpr, GROUP: tl.constexpr, GROUP_ROWS: tl.constexpr,
    HEAD: tl.constexpr, HEAD_BLOCK: tl.constexpr, BLOCK_Q: tl.constexpr, TOKENS: tl.constexpr, NARROW: tl.constexpr,
):  # fmt: skip
    """out = softmax(scale q K^T) V of a tile and a key head. Grid (tiles, KV_HEADS, CHUNKS).

    A row that is token i sees the tokens j < ends[row]; with a window, of these only j > i - window and j < sinks.

    Args:
        q, out: float32 [T, KV_HEADS * GROUP * HEAD].
        cache: float32 or bf16 [blocks, block_elements], see `store.CudaStore`.
        block_tables: int32 [S, most_blocks].
        tiles: see `division.Tiles`. ends: int32 [T], in tokens of the sequence.
        partial, stats: float32 [tiles, KV_HEADS, GROUP, CHUNKS, HEAD] and [.., 2], written instead of `out` if CHUNKS > 1: sums
            of values that are not divided by the sum of weights yet; the maximum, and the sum of weights.
        chunk_blocks: blocks of a chunk.
        GROUP_ROWS: a power of two >= GROUP; HEAD_BLOCK: one >= HEAD; BLOCK_Q * GROUP_ROWS >= 16.
    """
    tile, kv_head, chunk = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    fields = tiles + tile * _FIELDS
    sequence, first_row, count = tl.load(fields), tl.load(fields + 1), tl.load(fields + 2)
    first_token, last_end = tl.load(fields + 3), tl.load(fields + 4)
    i = tl.arange(0, BLOCK_Q * GROUP_ROWS)
    query, member = i // GROUP_ROWS, i % GROUP_ROWS
    real = (query < count) & (member < GROUP)
    token = first_token + query
    end = tl.load(ends + first_row + query, mask=real, other=0)
    d = tl.arange(0, HEAD_BLOCK)
    q_place = ((first_row + query).to(tl.int64) * KV_HEADS + kv_head) * (GROUP * HEAD) + member * HEAD
    q_mask = real[:, None] & (d < HEAD)[None, :]
    rows = tl.load(q + q_place[:, None] + d[None, :], mask=q_mask, other=0.0)

    # The blocks to read, numbered without those between the sinks and the first row's window.
    first_block = 0
    sink_blocks = 0
    if window > 0:
        first_block = tl.maximum(first_token + 1 - window, 0) // 32
        sink_blocks = tl.minimum((sinks + 31) // 32, first_block)
    blocks = sink_blocks + (last_end + 31) // 32 - first_block
    begin = chunk * chunk_blocks
    stop = tl.minimum(begin + chunk_blocks, blocks)

    maximum = tl.full([BLOCK_Q * GROUP_ROWS], float("-inf"), tl.float32)
    weights = tl.zeros([BLOCK_Q * GROUP_ROWS], tl.float32)
    sums = tl.zeros([BLOCK_Q * GROUP_ROWS, HEAD_BLOCK], tl.float32)
    t = tl.arange(0, TOKENS)
    for start in range(begin, stop, TOKENS // 32):
        number = start + t // 32
        block = tl.where(number < sink_blocks, number, first_block + number - sink_blocks)
        key = block * 32 + t % 32
        stored = (number < stop) & (key < last_end)
        page = tl.load(block_tables + sequence * most_blocks + block, mask=stored, other=0).to(tl.int64)
        place = page * block_elements + layer_offset + (kv_head * 32 + t % 32) * HEAD
        k = tl.load(cache + place[None, :] + d[:, None], mask=stored[None, :] & (d < HEAD)[:, None], other=0.0)
        scores = tl.zeros([BLOCK_Q * GROUP_ROWS, TOKENS], tl.float32)
        scores = add_product(scores, rows, k, NARROW) * scale
        seen = stored[None, :] & (key[None, :] < end[:, None])
        if window > 0:
            seen = seen & ((key[None, :] > token[:, None] - window) | (key < sinks)[None, :])
        scores = tl.where(seen, scores, float("-inf"))
        top = tl.maximum(maximum, tl.max(scores, 1))
        shift = tl.where(top == float("-inf"), 0.0, top)  # a row that has seen nothing yet: e^(-inf - 0) is 0, not NaN
        weight = tl.exp(scores - shift[:, None])
        fade = tl.exp(maximum - shift)
        weights = weights * fade + tl.sum(weight, 1)
        value_place = place + KV_HEADS * 32 * HEAD
        v = tl.load(cache + value_place[:, None] + d[None, :], mask=stored[:, None] & (d < HEAD)[None, :], other=0.0)
        sums = add_product(sums * fade[:, None], weight, v, NARROW)
        maximum = top
    if CHUNKS == 1:
        divisor = tl.where(real, weights, 1.0)
        tl.store(out + q_place[:, None] + d[None, :], sums / divisor[:, None], mask=q_mask)
    else:
        part = ((tile.to(tl.int64) * KV_HEADS + kv_head) * GROUP + member) * CHUNKS + chunk
        tl.store(partial + part[:, None] * HEAD + d[None, :], sums, mask=q_mask)
        tl.store(stats + part * 2, maximum, mask=real)
        tl.store(stats + part * 2 + 1, weights, mask=real)


@triton.jit
def merge_chunks(
    partial, stats, tiles, out, CHUNKS: tl.constexpr, CHUNK_ROWS: tl.constexpr, HEADS: tl.constexpr, HEAD: tl.constexpr,
    HEAD_BLOCK: tl.constexpr,
):  # fmt: skip
    """Combines the chunks of tiles with at most one row. Grid (tiles, HEADS). Arguments as in `attend_tile`; CHUNK_ROWS: a
    power of two >= CHUNKS."""
    tile, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    chunk, d = tl.arange(0, CHUNK_ROWS), tl.arange(0, HEAD_BLOCK)
    part = (tile * HEADS + head) * CHUNKS + chunk
    maximum = tl.load(stats + part * 2, mask=chunk < CHUNKS, other=float("-inf"))
    weights = tl.load(stats + part * 2 + 1, mask=chunk < CHUNKS, other=0.0)
    fade = tl.exp(maximum - tl.max(maximum, 0))
    mask = (chunk < CHUNKS)[:, None] & (d < HEAD)[None, :]
    sums = tl.load(partial + part[:, None] * HEAD + d[None, :], mask=mask, other=0.0)
    value = tl.sum(sums * fade[:, None], 0) / tl.sum(weights * fade, 0)
    row, count = tl.load(tiles + tile * _FIELDS + 1).to(tl.int64), tl.load(tiles + tile * _FIELDS + 2)
    tl.store(out + (row * HEADS + head) * HEAD + d, value, mask=d < tl.where(count > 0, HEAD, 0))


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
) -> None:
    """See `attend_tile`. Rows of other tiles are not written."""
    count, head, group = len(tiles.fields), q.shape[1] // heads, heads // kv_heads
    chunks, blocks = chunks_of(tiles.planned, tiles.blocks, kv_heads), block_tables.shape[1]
    group_rows, narrow = triton.next_power_of_2(group), cache.dtype == torch.bfloat16
    block_q = max(tiles.block_q, triton.cdiv(16, group_rows))
    head_block = max(16, triton.next_power_of_2(head))
    partial = stats = out
    if chunks > 1:
        partial = torch.empty((count, heads, chunks, head), dtype=torch.float32, device=q.device)
        stats = torch.empty((count, heads, chunks, 2), dtype=torch.float32, device=q.device)
    attend_tile[(count, kv_heads, chunks)](
        q, cache, block_tables, tiles.fields, ends, out, partial, stats, cache.stride(0), layer_offset, blocks,
        triton.cdiv(tiles.blocks, chunks) if chunks > 1 else blocks, scale, window, sinks, CHUNKS=chunks, KV_HEADS=kv_heads,
        GROUP=group, GROUP_ROWS=group_rows, HEAD=head, HEAD_BLOCK=head_block, BLOCK_Q=block_q,
        TOKENS=64 if narrow else 32, NARROW=narrow, num_warps=4 if narrow else 8, num_stages=2,
    )  # fmt: skip
    if chunks > 1:
        merge_chunks[(count, heads)](
            partial, stats, tiles.fields, out, CHUNKS=chunks, CHUNK_ROWS=triton.next_power_of_2(chunks), HEADS=heads, HEAD=head,
            HEAD_BLOCK=head_block, num_warps=2,
        )  # fmt: skip
