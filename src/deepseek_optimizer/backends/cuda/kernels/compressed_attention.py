"""Compressed attention: all heads attend to the same rows of the cache, the last tokens and entries of the tokens before.

A row is the key and the value of all heads, so one program computes a tile of BLOCK_Q rows for HEAD_ROWS heads, as in
`latent_attention.py`. It reads the blocks of the window first, then entries, TOKENS at a time; both are numbered in one
sequence, which decoding divides into chunks (`paged.merge_chunks`). Each is in the blocks of its own group of the cache.

Scores and sums are fp32. With a bf16 cache, queries and the softmax's weights are rounded to bf16 for products on tensor cores;
with an fp32 cache nothing is rounded, and PART elements are multiplied at a time. `graph/ops/compressed.py` has the formula.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..division import HEAD_ROWS, TILE_FIELDS, Tiles
from .paged import chunk_memory, finish_tile, launch_merge, next_weights, with_sink
from .precision import add_product, nearest_bf16

_FIELDS = tl.constexpr(TILE_FIELDS)


@triton.jit
def attend_rows(
    q, cache, window_tables, entry_tables, tiles, sinks, chosen, out, partial, stats, block_elements, offset, entry_offset,
    most_blocks, chunk_blocks, scale, window, heads, CHUNKS: tl.constexpr, HEAD_ROWS: tl.constexpr, HEAD: tl.constexpr,
    HEAD_BLOCK: tl.constexpr, EVERY: tl.constexpr, TOP_K: tl.constexpr, BLOCK_Q: tl.constexpr, TOKENS: tl.constexpr,
    PART: tl.constexpr, NARROW: tl.constexpr,
):  # fmt: skip
    """out = softmax(scale q R^T, sink) R for the visible rows R. Grid (tiles, blocks of heads, CHUNKS).

    Args:
        q, out: float32 [T, heads, HEAD].
        cache: float32 or bf16 [blocks, block_elements], see `rows_store.CudaRowsStore`.
        window_tables, entry_tables: int32 [S, most_blocks], blocks with the rows of tokens, and with entries.
        tiles: see `division.Tiles`.
        sinks: float32 [heads], a further score of each head, whose row is 0.
        chosen: float32 [T, TOP_K], the entries that each row attends to, ascending, -1 after the last; tiles then have one row.
            TOP_K is 0: all that the row sees.
        partial, stats: float32 [tiles, heads, CHUNKS, HEAD] and [.., 2], written instead of `out` if CHUNKS > 1, for
            `merge_chunks`.
        offset, entry_offset: where rows and entries begin in a block.
        chunk_blocks: of 32 rows of the cache, of a chunk.
        EVERY: tokens of an entry; 0: there are no entries.
        HEAD_BLOCK: a power of two >= HEAD; BLOCK_Q * HEAD_ROWS >= 16.
        PART: elements that are multiplied at a time without NARROW.
    """
    tile, chunk = tl.program_id(0), tl.program_id(2)
    fields = tiles + tile * _FIELDS
    sequence, first_row, count = tl.load(fields), tl.load(fields + 1), tl.load(fields + 2)
    first_token, last_end = tl.load(fields + 3), tl.load(fields + 4)
    i = tl.arange(0, BLOCK_Q * HEAD_ROWS)
    query, head = i // HEAD_ROWS, tl.program_id(1) * HEAD_ROWS + i % HEAD_ROWS
    real = (query < count) & (head < heads)
    token, d = first_token + query, tl.arange(0, HEAD_BLOCK)
    own = ((first_row + query).to(tl.int64) * heads + head) * HEAD
    place_out, mask_out = own[:, None] + d[None, :], real[:, None] & (d < HEAD)[None, :]
    rows = tl.zeros([1, 1], tl.float32)
    if NARROW:
        rows = nearest_bf16(tl.load(q + place_out, mask=mask_out, other=0.0))

    first_block = tl.maximum(first_token + 1 - window, 0) // 32
    window_blocks = (last_end + 31) // 32 - first_block
    entries = 0
    if EVERY > 0:
        entries = last_end // EVERY
    if TOP_K > 0:
        entries = tl.minimum(entries, TOP_K)
    begin = chunk * chunk_blocks
    stop = tl.minimum(begin + chunk_blocks, window_blocks + (entries + 31) // 32)
    maximum = tl.full([BLOCK_Q * HEAD_ROWS], float("-inf"), tl.float32)
    weights = tl.zeros([BLOCK_Q * HEAD_ROWS], tl.float32)
    sums = tl.zeros([BLOCK_Q * HEAD_ROWS, HEAD_BLOCK], tl.float32)
    pages, entry_pages = window_tables + sequence * most_blocks, entry_tables + sequence * most_blocks
    for start in range(begin * 32, stop * 32, TOKENS):
        t = start + tl.arange(0, TOKENS)
        key = first_block * 32 + t
        of_window = (t < window_blocks * 32) & (key < last_end)
        page = tl.load(pages + key // 32, mask=of_window, other=0).to(tl.int64)
        place = page * block_elements + offset + key % 32 * HEAD
        seen = of_window[None, :] & (key[None, :] <= token[:, None]) & (key[None, :] > token[:, None] - window)
        stored = of_window
        if EVERY > 0:
            entry = t - window_blocks * 32
            of_entries = (entry >= 0) & (entry < entries)
            if TOP_K > 0:
                entry = tl.load(chosen + first_row.to(tl.int64) * TOP_K + entry, mask=of_entries, other=-1.0).to(tl.int32)
                of_entries = of_entries & (entry >= 0)
            last = (entry + 1) * EVERY - 1
            page = tl.load(entry_pages + last // 32, mask=of_entries, other=0).to(tl.int64)
            place = tl.where(of_entries, page * block_elements + entry_offset + last % 32 // EVERY * HEAD, place)
            seen = seen | (of_entries[None, :] & (last[None, :] <= token[:, None]))
            stored = stored | of_entries
        keys = tl.load(cache + place[:, None] + d[None, :], mask=stored[:, None] & (d < HEAD)[None, :], other=0.0)
        scores = tl.zeros([BLOCK_Q * HEAD_ROWS, TOKENS], tl.float32)
        if NARROW:
            scores = add_product(scores, rows, tl.trans(keys), NARROW)
        else:
            for part in range(0, HEAD, PART):
                p = part + tl.arange(0, PART)
                some = tl.load(q + own[:, None] + p[None, :], mask=real[:, None] & (p < HEAD)[None, :], other=0.0)
                mask = stored[None, :] & (p < HEAD)[:, None]
                scores = add_product(scores, some, tl.load(cache + place[None, :] + p[:, None], mask=mask, other=0.0), NARROW)
        weight, fade, maximum, weights = next_weights(scores * scale, seen, maximum, weights)
        sums = add_product(sums * fade[:, None], weight, keys, NARROW)
    if CHUNKS == 1:
        sink = tl.load(sinks + head, mask=real, other=0.0)
        maximum, weights, sums = with_sink(maximum, weights, sums, sink)
    part = (tile.to(tl.int64) * heads + head) * CHUNKS + chunk
    finish_tile(maximum, weights, sums, real, out, place_out, mask_out, d, part, partial, stats, CHUNKS, HEAD)


def attention(
    q: torch.Tensor,
    cache: torch.Tensor,
    offset: int,
    window_tables: torch.Tensor,
    entries: tuple[int, torch.Tensor, int] | None,
    tiles: Tiles,
    sinks: torch.Tensor,
    out: torch.Tensor,
    *,
    scale: float,
    window: int,
    chosen: torch.Tensor | None = None,
) -> None:
    """See `attend_rows`. Rows of other tiles are not written.

    Args:
        q, out: float32 [T, heads, head], contiguous.
        entries: where they begin in a block, the tables of their group, and the tokens of an entry; None: there are none.
    """
    (_, heads, head), count = q.shape, len(tiles.fields)
    narrow, top_k = cache.dtype == torch.bfloat16, 0 if chosen is None else chosen.shape[1]
    entry_offset, entry_tables, every = (0, window_tables, 0) if entries is None else entries
    head_rows = min(HEAD_ROWS if narrow else max(1, 16 // tiles.block_q), triton.next_power_of_2(heads))
    head_blocks, block_q = triton.cdiv(heads, head_rows), max(tiles.block_q, triton.cdiv(16, head_rows))
    blocks = rows_blocks(tiles.blocks, window, every, top_k)
    chunks = tiles.division.chunks(tiles.planned, blocks, head_blocks)
    partial, stats = chunk_memory(tiles, heads, chunks, head, out)
    chunk_blocks = triton.cdiv(blocks, chunks) if chunks > 1 else rows_blocks(window_tables.shape[1], window, every, top_k)
    attend_rows[(count, head_blocks, chunks)](
        q, cache, window_tables, entry_tables, tiles.fields, sinks, q if chosen is None else chosen, out, partial, stats,
        cache.stride(0), offset, entry_offset, window_tables.shape[1], chunk_blocks, scale, window, heads, CHUNKS=chunks,
        HEAD_ROWS=head_rows, HEAD=head, HEAD_BLOCK=max(16, triton.next_power_of_2(head)), EVERY=every, TOP_K=top_k,
        BLOCK_Q=block_q, TOKENS=32 if narrow else 16, PART=32, NARROW=narrow,
        num_warps=4 if narrow and block_q * head_rows <= 16 else 8, num_stages=2,
    )  # fmt: skip
    if chunks > 1:
        launch_merge(partial, stats, tiles, out, sinks)


def rows_blocks(blocks: int, window: int, every: int, top_k: int) -> int:
    """The most blocks of 32 rows that a row of a sequence with this number of blocks reads: of its window, whose tile may have
    several rows, and of entries. Zero if that is the number of blocks."""
    if not blocks:
        return 0
    entries = 32 * blocks // every if every else 0
    return blocks_of_window(blocks, window) + triton.cdiv(min(entries, top_k) if top_k else entries, 32)


def blocks_of_window(blocks: int, window: int) -> int:
    """The most blocks that a tile's window reaches into: of rows of at most 64 tokens."""
    return min(blocks, triton.cdiv(window + 63, 32) + 1)
