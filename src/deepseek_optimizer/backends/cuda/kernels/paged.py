"""What kernels of attention over a paged cache share: which blocks a tile reads, and a softmax in one pass over them.

A tile reads blocks of 32 tokens from first to last with a running maximum and sum (Milakov and Gimelshein 2018, Dao et al.
2022). Decoding has tiles of one row and hence few programs. With several chunks, the blocks of a tile are divided among
programs, whose unfinished results go to memory, and `merge_chunks` combines them (Flash-Decoding, Dao et al. 2023).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..division import TILE_FIELDS, Tiles

_FIELDS = tl.constexpr(TILE_FIELDS)
_MERGED = 8192  # elements of all chunks that a program of `merge_chunks` combines, at most, if a head has more


@triton.jit
def first_seen(token, window, CHUNKED: tl.constexpr):
    """The first token that a row with this token sees, apart from sinks: of a window that ends with it, or if CHUNKED of its
    chunk of `window` tokens. May be negative."""
    if CHUNKED:
        first = token - token % window
    else:
        first = token + 1 - window
    return first


@triton.jit
def blocks_to_read(first_token, last_end, window, sinks, CHUNKED: tl.constexpr = False):
    """The number of blocks that a tile reads, how many of them belong to the sinks, and the block of the sequence that follows
    these: those between the sinks and the first row's window are left out."""
    first_block = 0
    sink_blocks = 0
    if window > 0:
        first_block = tl.maximum(first_seen(first_token, window, CHUNKED), 0) // 32
        sink_blocks = tl.minimum((sinks + 31) // 32, first_block)
    return sink_blocks + (last_end + 31) // 32 - first_block, sink_blocks, first_block


@triton.jit
def tokens_to_read(t, stop, sink_blocks, first_block, last_end, block_tables):
    """Of tokens t, numbered as they are read: the numbers in the sequence, their blocks of the cache in int64, and whether they
    are stored and before block `stop`."""
    number = t // 32
    block = tl.where(number < sink_blocks, number, first_block + number - sink_blocks)
    key = block * 32 + t % 32
    stored = (number < stop) & (key < last_end)
    return key, tl.load(block_tables + block, mask=stored, other=0).to(tl.int64), stored


@triton.jit
def chosen_tokens(t, stop, chosen, last_end, block_tables):
    """As `tokens_to_read`, of the blocks that a row has chosen.

    Args:
        chosen: float32, numbers of blocks in the sequence, -1: none.
    """
    number = t // 32
    block = tl.load(chosen + number, mask=number < stop, other=-1.0).to(tl.int32)
    key = block * 32 + t % 32
    stored = (block >= 0) & (key < last_end)
    return key, tl.load(block_tables + block, mask=stored, other=0).to(tl.int64), stored


@triton.jit
def rows_to_read(first_token, count, last_end, window):
    """Where all tokens of a sequence are rows of the step: the number of blocks of 32 tokens that a tile of `count` rows reads,
    the first of them, and one past the last token, for windows to both sides."""
    first_block = 0
    if window > 0:
        first_block = tl.maximum(first_token - window, 0) // 32
        last_end = tl.minimum(last_end, first_token + count + window)
    return (last_end + 31) // 32 - first_block, first_block, last_end


@triton.jit
def scales_of(cache, layer, KV_HEADS: tl.constexpr, HEAD: tl.constexpr):
    """Pointers to the scales of a layer in blocks of a cache of codes, float32 [2, KV_HEADS, 32].

    Args:
        layer: where the layer begins, in bytes.
    """
    return cache.to(tl.pointer_type(tl.float32), bitcast=True) + (layer + 2 * KV_HEADS * 32 * HEAD) // 4


@triton.jit
def seen_by_rows(key, stored, token, end, window, sinks, CHUNKED: tl.constexpr = False):
    """bool [rows, keys]: a row that is token i sees the tokens j < end; with a window, of these only those from `first_seen`
    on and j < sinks."""
    seen = stored[None, :] & (key[None, :] < end[:, None])
    if window > 0:
        seen = seen & ((key[None, :] >= first_seen(token, window, CHUNKED)[:, None]) | (key < sinks)[None, :])
    return seen


@triton.jit
def seen_to_both_sides(key, stored, token, end, window):
    """bool [rows, keys]: a row that is token i sees the tokens j < end, with a window those with |i - j| <= window."""
    seen = stored[None, :] & (key[None, :] < end[:, None])
    if window > 0:
        seen = seen & (tl.abs(key[None, :] - token[:, None]) <= window)
    return seen


@triton.jit
def next_weights(scores, seen, maximum, weights):
    """One step of the softmax over keys.

    Returns: the weights of these keys, [rows, keys]; the factor of earlier sums; the new maximum and sum of weights.
    """
    scores = tl.where(seen, scores, float("-inf"))
    top = tl.maximum(maximum, tl.max(scores, 1))
    shift = tl.where(top == float("-inf"), 0.0, top)  # a row that has seen nothing yet: e^(-inf - 0) is 0, not NaN
    weight = tl.exp(scores - shift[:, None])
    fade = tl.exp(maximum - shift)
    return weight, fade, top, weights * fade + tl.sum(weight, 1)


@triton.jit
def with_sink(maximum, weights, sums, sink):
    """The softmax of rows with one more key each, whose score is `sink` and whose value is 0."""
    top = tl.maximum(maximum, sink)
    fade = tl.exp(maximum - top)
    return top, weights * fade + tl.exp(sink - top), sums * fade[:, None]


@triton.jit
def finish_tile(
    maximum, weights, sums, real, out, out_place, mask, d, part, partial, stats, CHUNKS: tl.constexpr, HEAD: tl.constexpr
):  # fmt: skip
    """Writes the results of a tile's rows, or with several chunks its part of them for `merge_chunks`.

    Args:
        real: whether there is a row.
        out_place: of the elements d of rows in `out`. mask: of what is written.
        part: of rows in `partial`, if there are several chunks.
    """
    if CHUNKS == 1:
        divisor = tl.where(real, weights, 1.0)
        tl.store(out + out_place, sums / divisor[:, None], mask=mask)
    else:
        tl.store(partial + part[:, None] * HEAD + d[None, :], sums, mask=mask)
        tl.store(stats + part * 2, maximum, mask=real)
        tl.store(stats + part * 2 + 1, weights, mask=real)


@triton.jit
def merge_chunks(
    partial, stats, tiles, sinks, out, CHUNKS: tl.constexpr, CHUNK_ROWS: tl.constexpr, HEADS: tl.constexpr, HEAD: tl.constexpr,
    HEAD_BLOCK: tl.constexpr, SINKS: tl.constexpr,
):  # fmt: skip
    """Combines the chunks of tiles with at most one row. Grid (tiles, HEADS, blocks of a head).

    Args:
        partial: float32 [tiles, HEADS, CHUNKS, HEAD], sums of values that are not divided by the sum of weights yet.
        stats: float32 [tiles, HEADS, CHUNKS, 2], the maximum, and the sum of weights.
        tiles: see `division.Tiles`.
        sinks: float32 [HEADS], the score of one more key of each head, whose value is 0; read if SINKS.
        out: float32 [T, HEADS * HEAD].
        CHUNK_ROWS: a power of two >= CHUNKS.
    """
    tile, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    chunk, d = tl.arange(0, CHUNK_ROWS), tl.program_id(2) * HEAD_BLOCK + tl.arange(0, HEAD_BLOCK)
    part = (tile * HEADS + head) * CHUNKS + chunk
    maximum = tl.load(stats + part * 2, mask=chunk < CHUNKS, other=float("-inf"))
    weights = tl.load(stats + part * 2 + 1, mask=chunk < CHUNKS, other=0.0)
    top = tl.max(maximum, 0)
    more = 0.0
    if SINKS:
        sink = tl.load(sinks + head)
        top = tl.maximum(top, sink)
        more = tl.exp(sink - top)
    fade = tl.exp(maximum - top)
    mask = (chunk < CHUNKS)[:, None] & (d < HEAD)[None, :]
    sums = tl.load(partial + part[:, None] * HEAD + d[None, :], mask=mask, other=0.0)
    value = tl.sum(sums * fade[:, None], 0) / (tl.sum(weights * fade, 0) + more)
    row, count = tl.load(tiles + tile * _FIELDS + 1).to(tl.int64), tl.load(tiles + tile * _FIELDS + 2)
    tl.store(out + (row * HEADS + head) * HEAD + d, value, mask=d < tl.where(count > 0, HEAD, 0))


def chunk_memory(tiles: Tiles, heads: int, chunks: int, head: int, out: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`partial` and `stats` of `merge_chunks`; `out` twice if there is one chunk, which needs neither."""
    if chunks == 1:
        return out, out
    count = len(tiles.fields)
    partial = torch.empty((count, heads, chunks, head), dtype=torch.float32, device=out.device)
    return partial, torch.empty((count, heads, chunks, 2), dtype=torch.float32, device=out.device)


def launch_merge(
    partial: torch.Tensor, stats: torch.Tensor, tiles: Tiles, out: torch.Tensor, sinks: torch.Tensor | None = None
) -> None:
    """See `merge_chunks`."""
    count, heads, chunks, head = partial.shape
    chunk_rows = triton.next_power_of_2(chunks)
    block = min(triton.next_power_of_2(head), max(16, _MERGED // chunk_rows))
    merge_chunks[(count, heads, triton.cdiv(head, block))](
        partial, stats, tiles.fields, partial if sinks is None else sinks, out, CHUNKS=chunks, CHUNK_ROWS=chunk_rows,
        HEADS=heads, HEAD=head, HEAD_BLOCK=block, SINKS=sinks is not None, num_warps=2,
    )  # fmt: skip
