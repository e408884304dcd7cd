"""Attention over a paged cache of latents, in the absorbed form of multi-head latent attention (MLA).

A row of the cache, a latent and a rotated key, is the key of all heads, and its latent is their value. So one program computes
a tile of BLOCK_Q rows for HEAD_ROWS heads: BLOCK_Q * HEAD_ROWS rows of a product, which share what is read, and latents are
read once for scores and sums. Queries are mapped to the space of latents before (K_h^T q_h), and sums of latents to values
after it (V_h s_h): `latent_attention` does both, for as many heads at a time as a bounded memory holds.

Decoding divides the blocks of a tile into chunks, as `attention.py` does. Scores and sums are fp32. Unless the cache is fp32,
queries, the softmax's weights, and codes of latents times their scales are rounded to bf16 for products on tensor cores. With
codes or an fp32 cache, programs have 16 rows, as operands are in registers. With an fp32 cache nothing is rounded, and PART
elements of 16 latents are multiplied at a time.

Source: DeepSeek-V2, section 2.1.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from ..division import HEAD_ROWS, TILE_FIELDS, Tiles, heads_at_once
from ..matrices import DeviceStack
from .codes import kind_of, latent_keys, latent_scales, numbers_of
from .heads import HeadInputs
from .paged import blocks_to_read, chunk_memory, finish_tile, launch_merge, next_weights, seen_by_rows, tokens_to_read
from .precision import add_product, nearest_bf16

_FIELDS = tl.constexpr(TILE_FIELDS)


@triton.jit
def scaled_latents(codes, cache, layer, key, stored, RANK: tl.constexpr, ROPE: tl.constexpr, KIND: tl.constexpr):
    """What codes [tokens, RANK_BLOCK] stand for, rounded to bf16 for products.

    Args:
        layer: where the layer begins in each token's block, in bytes, [tokens].
    """
    TOKENS: tl.constexpr = codes.shape[0]
    BLOCKS: tl.constexpr = max(1, codes.shape[1] // 128)  # a power of two >= the groups that there are
    GROUPS: tl.constexpr = (RANK + 127) // 128
    group = tl.arange(0, BLOCKS)[None, :]
    place = latent_scales(cache, layer, RANK, ROPE) + key % 32 * GROUPS
    scales = tl.load(place[:, None] + group, mask=stored[:, None] & (group < GROUPS), other=0.0)
    grouped = tl.reshape(numbers_of(codes, KIND), [TOKENS, BLOCKS, codes.shape[1] // BLOCKS])
    return nearest_bf16(tl.reshape(grouped * scales[:, :, None], [TOKENS, codes.shape[1]]))


@triton.jit
def attend_latents(
    absorbed, q, q_stride, cache, block_tables, tiles, ends, out, partial, stats, block_elements, layer_offset, most_blocks,
    chunk_blocks, scale, window, sinks, heads, chosen, CHUNKS: tl.constexpr, HEAD_ROWS: tl.constexpr, NOPE: tl.constexpr,
    ROPE: tl.constexpr, ROPE_BLOCK: tl.constexpr, RANK: tl.constexpr, RANK_BLOCK: tl.constexpr, BLOCK_Q: tl.constexpr,
    TOKENS: tl.constexpr, PART: tl.constexpr, NARROW: tl.constexpr, KIND: tl.constexpr, TOP_K: tl.constexpr,
):  # fmt: skip
    """out = softmax(scale (absorbed C^T + q^rope R^T)) C for the visible latents C and rotated keys R. Grid (tiles, blocks of
    heads, CHUNKS).

    Args:
        absorbed, out: float32 [T, heads, RANK]; out may be `absorbed`.
        q: float32, heads of NOPE + ROPE elements, rows `q_stride` apart; only the last ROPE are read.
        cache: float32, bf16, or codes of a KIND [blocks, block_elements], see `latent_store.CudaLatentStore`.
        block_tables: int32 [S, most_blocks].
        tiles: see `division.Tiles`. ends: int32 [T], in tokens of the sequence.
        partial, stats: float32 [tiles, heads, CHUNKS, RANK] and [.., 2], written instead of `out` if CHUNKS > 1, for
            `merge_chunks`.
        chunk_blocks: blocks of a chunk.
        ROPE_BLOCK, RANK_BLOCK: powers of two >= ROPE and RANK; BLOCK_Q * HEAD_ROWS >= 16.
        PART: elements of latents that are multiplied at a time without NARROW.
        KIND: of codes, see `codes.kind_of`; "": latents are floats.
        chosen: float32 [T, TOP_K], the tokens that each row attends to, ascending, -1 after the last; tiles then have one row
            and no window. TOP_K is 0: all visible tokens.
    """
    WIDTH: tl.constexpr = RANK + ROPE if KIND == "" else RANK
    tile, chunk = tl.program_id(0), tl.program_id(2)
    fields = tiles + tile * _FIELDS
    sequence, first_row, count = tl.load(fields), tl.load(fields + 1), tl.load(fields + 2)
    first_token, last_end = tl.load(fields + 3), tl.load(fields + 4)
    i = tl.arange(0, BLOCK_Q * HEAD_ROWS)
    query, head = i // HEAD_ROWS, tl.program_id(1) * HEAD_ROWS + i % HEAD_ROWS
    real = (query < count) & (head < heads)
    token, row = first_token + query, (first_row + query).to(tl.int64)
    end = tl.load(ends + first_row + query, mask=real, other=0)
    c, r = tl.arange(0, RANK_BLOCK), tl.arange(0, ROPE_BLOCK)
    place_out = ((row * heads + head) * RANK)[:, None] + c[None, :]
    mask_out = real[:, None] & (c < RANK)[None, :]
    rotated_place = (row * q_stride + head * (NOPE + ROPE) + NOPE)[:, None] + r[None, :]
    rotated = tl.load(q + rotated_place, mask=real[:, None] & (r < ROPE)[None, :], other=0.0)
    rows = rotated
    if NARROW:
        rows, rotated = nearest_bf16(tl.load(absorbed + place_out, mask=mask_out, other=0.0)), nearest_bf16(rotated)

    blocks, sink_blocks, first_block = blocks_to_read(first_token, last_end, window, sinks)
    if TOP_K > 0:
        blocks = (tl.minimum(last_end, TOP_K) + 31) // 32  # of chosen tokens
    begin = chunk * chunk_blocks
    stop = tl.minimum(begin + chunk_blocks, blocks)
    maximum = tl.full([BLOCK_Q * HEAD_ROWS], float("-inf"), tl.float32)
    weights = tl.zeros([BLOCK_Q * HEAD_ROWS], tl.float32)
    sums = tl.zeros([BLOCK_Q * HEAD_ROWS, RANK_BLOCK], tl.float32)
    pages = block_tables + sequence * most_blocks
    for start in range(begin * 32, stop * 32, TOKENS):
        t = start + tl.arange(0, TOKENS)
        if TOP_K > 0:
            inside = (t < stop * 32) & (t < TOP_K)
            key = tl.load(chosen + first_row.to(tl.int64) * TOP_K + t, mask=inside, other=-1.0).to(tl.int32)
            stored = key >= 0
            page = tl.load(pages + key // 32, mask=stored, other=0).to(tl.int64)
        else:
            key, page, stored = tokens_to_read(t, stop, sink_blocks, first_block, last_end, pages)
        place = page * block_elements + layer_offset + key % 32 * WIDTH
        latents = tl.load(cache + place[:, None] + c[None, :], mask=stored[:, None] & (c < RANK)[None, :], other=0)
        if KIND == "":
            key_place = cache + place + RANK
        else:
            latents = scaled_latents(latents, cache, page * block_elements + layer_offset, key, stored, RANK, ROPE, KIND)
            key_place = latent_keys(cache, page * block_elements + layer_offset, RANK) + key % 32 * ROPE
        keys = tl.load(key_place[None, :] + r[:, None], mask=stored[None, :] & (r < ROPE)[:, None], other=0.0)
        scores = tl.zeros([BLOCK_Q * HEAD_ROWS, TOKENS], tl.float32)
        if NARROW:
            scores = add_product(scores, rows, tl.trans(latents), NARROW)
        else:
            for part in range(0, RANK, PART):
                p = part + tl.arange(0, PART)
                mask = real[:, None] & (p < RANK)[None, :]
                some = tl.load(absorbed + ((row * heads + head) * RANK)[:, None] + p[None, :], mask=mask, other=0.0)
                mask = stored[None, :] & (p < RANK)[:, None]
                scores = add_product(scores, some, tl.load(cache + place[None, :] + p[:, None], mask=mask, other=0.0), NARROW)
        scores = add_product(scores, rotated, keys, NARROW) * scale
        seen = seen_by_rows(key, stored, token, end, window, sinks)
        weight, fade, maximum, weights = next_weights(scores, seen, maximum, weights)
        sums = add_product(sums * fade[:, None], weight, latents, NARROW)
    part = (tile.to(tl.int64) * heads + head) * CHUNKS + chunk
    finish_tile(maximum, weights, sums, real, out, place_out, mask_out, c, part, partial, stats, CHUNKS, RANK)


def attend(
    absorbed: torch.Tensor,
    q: torch.Tensor,
    cache: torch.Tensor,
    layer_offset: int,
    block_tables: torch.Tensor,
    tiles: Tiles,
    ends: torch.Tensor,
    *,
    rope: int,
    scale: float,
    window: int = 0,
    sinks: int = 0,
    chosen: torch.Tensor | None = None,
) -> None:
    """See `attend_latents`: replaces the rows of `absorbed` by their sums of latents. Rows of other tiles are not changed.

    Args:
        absorbed: float32 [T, heads, rank], contiguous.
        q: float32 [T, heads, nope + rope].
    """
    (_, heads, rank), count = absorbed.shape, len(tiles.fields)
    narrow = cache.dtype != torch.float32
    plain = cache.dtype == torch.bfloat16
    head_rows = min(HEAD_ROWS if plain else max(1, 16 // tiles.block_q), triton.next_power_of_2(heads))
    head_blocks, top_k = triton.cdiv(heads, head_rows), 0 if chosen is None else chosen.shape[1]
    blocks = tiles.blocks if chosen is None else min(tiles.blocks, triton.cdiv(top_k, 32))
    chunks = tiles.division.chunks(tiles.planned, blocks, head_blocks)
    block_q = max(tiles.block_q, triton.cdiv(16, head_rows))
    partial, stats = chunk_memory(tiles, heads, chunks, rank, absorbed)
    table_blocks = block_tables.shape[1]
    attend_latents[(count, head_blocks, chunks)](
        absorbed, q, q.stride(0), cache, block_tables, tiles.fields, ends, absorbed, partial, stats, cache.stride(0),
        layer_offset, table_blocks, triton.cdiv(blocks, chunks) if chunks > 1 else table_blocks, scale, window, sinks, heads,
        absorbed if chosen is None else chosen, CHUNKS=chunks, HEAD_ROWS=head_rows, NOPE=q.shape[2] - rope, ROPE=rope,
        ROPE_BLOCK=max(16, triton.next_power_of_2(rope)), RANK=rank, RANK_BLOCK=max(16, triton.next_power_of_2(rank)),
        BLOCK_Q=block_q, TOKENS=32 if narrow else 16, PART=32, NARROW=narrow, KIND=kind_of(cache), TOP_K=top_k,
        num_warps=4 if plain and block_q * head_rows <= 16 else 8, num_stages=2,
    )  # fmt: skip
    if chunks > 1:
        launch_merge(partial, stats, tiles, absorbed)


def latent_attention(
    q: torch.Tensor,
    keys: DeviceStack,
    values: DeviceStack,
    cache: torch.Tensor,
    layer_offset: int,
    block_tables: torch.Tensor,
    phases: Sequence[Tiles],
    ends: torch.Tensor,
    out: torch.Tensor,
    *,
    scale: float,
    window: int = 0,
    sinks: int = 0,
    chosen: torch.Tensor | None = None,
) -> None:
    """Latent attention of all rows of a step; see op `mla_attention`.

    Args:
        q: float32 [T, heads, nope + rope], contiguous.
        keys: K_h^T [rank, nope] of each head.
        values: V_h [v_dim, rank] of each head.
        chosen: as in `attend_latents`; None: all visible tokens.
        out: float32 [T, heads, v_dim], contiguous.
    """
    rows, heads, width = q.shape
    most, queries = heads_at_once(rows, heads, keys.rows), HeadInputs(q, keys)
    for first in range(0, heads, most):
        count = min(most, heads - first)
        latents = torch.empty((rows, count, keys.rows), dtype=torch.float32, device=q.device)
        queries.products(keys, first, latents)
        for tiles in phases:
            attend(
                latents, q[:, first:], cache, layer_offset, block_tables, tiles, ends, rope=width - keys.cols, scale=scale,
                window=window, sinks=sinks, chosen=chosen,
            )  # fmt: skip
        HeadInputs(latents, values).products(values, 0, out[:, first : first + count], first)
