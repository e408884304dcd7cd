"""Latent attention of long prompts in the expanded form: ordinary attention over keys and values of every head.

The absorbed form (`latent_attention.py`) multiplies each query with whole latents, in every head. It reads little, which is
what decoding needs, but computes more than three times as much as attention over expanded keys and values, whose products with
`kv_b` are shared by all queries of a prompt (`division.expands` compares both). The keys of a sequence are expanded a chunk at
a time, so that their memory is bounded whatever the context is. The softmax goes on from chunk to chunk: unfinished sums are
in the output, the maximum and sum of weights of each row in `stats`.

Scores and sums are fp32. With a bf16 cache, keys and values are rounded to bf16, as queries and the softmax's weights are for
products on tensor cores; with an fp32 cache nothing is rounded.

Source: DeepSeek-V2, section 2.1.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..division import expanded_keys
from ..matrices import DeviceStack
from .heads import head_tile_product
from .linear_tile import ordered_rows, tile_sizes, weight_block, weight_values
from .paged import next_weights
from .precision import add_product
from .rope import store_as

_ROWS, _BLOCK = 16, 128  # tokens and columns of a program of `gather_latents`
_LATENTS = 32  # elements of latents that a program of `expand_keys` reads at a time


@triton.jit
def gather_latents(
    cache, block_table, out, first, tokens, block_elements, layer_offset, RANK: tl.constexpr, ROPE: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out[i] = the latent of token first + i of a sequence, float32 [tokens, RANK]. Grid (blocks of tokens, and of columns).

    Args:
        cache: float32 or bf16 [blocks, block_elements], see `latent_store.CudaLatentStore`.
        block_table: int32 [blocks], of the sequence.
    """
    i = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    column = (tl.program_id(1) * BLOCK + tl.arange(0, BLOCK))[None, :]
    token = first + i
    page = tl.load(block_table + token // 32, mask=i < tokens, other=0).to(tl.int64)
    place = cache + page * block_elements + layer_offset + token % 32 * (RANK + ROPE) + column
    inside = (i < tokens) & (column < RANK)
    tl.store(out + i * RANK + column, tl.load(place, mask=inside, other=0.0).to(tl.float32), mask=inside)


@triton.jit
def expand_keys(
    latents, words, out, tokens, groups, matrix_words, LAYOUT: tl.constexpr, RANK: tl.constexpr, NOPE: tl.constexpr,
    TOKENS: tl.constexpr, WORDS: tl.constexpr, LATENTS: tl.constexpr,
):  # fmt: skip
    """out[h, i] = K_h latents[i]. Grid (blocks of tokens, blocks of words, heads).

    Args:
        latents: float32 [tokens, RANK].
        words: the tiles of K_h^T [RANK, NOPE] of each head, see `DeviceStack`; in fp32 or bf16.
        out: float32 or bf16 [heads, tokens, NOPE].
        matrix_words: words between two matrices.
    """
    t, head = (tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)).to(tl.int64), tl.program_id(2).to(tl.int64)
    j = tl.program_id(1) * WORDS + tl.arange(0, WORDS)
    matrix = words + head * matrix_words
    PER_WORD: tl.constexpr = LAYOUT.per_word
    for part in tl.static_range(PER_WORD):
        total = tl.zeros([TOKENS, WORDS], tl.float32)
        for start in range(0, RANK, LATENTS):
            r = start + tl.arange(0, LATENTS)
            mask = (t < tokens)[:, None] & (r < RANK)[None, :]
            some = tl.load(latents + t[:, None] * RANK + r[None, :], mask=mask, other=0.0)
            inside = (j < groups * LAYOUT.words)[:, None] & (r < RANK)[None, :]
            low, high, scale, minimum = weight_block(matrix, j, r, groups, inside, LAYOUT)
            keys = weight_values(low, high, scale, minimum, part, LAYOUT)
            total = add_product(total, some, tl.trans(keys), LAYOUT.narrow)
        column = j * PER_WORD + part
        place = out + (head * tokens + t[:, None]) * NOPE + column[None, :]
        store_as(place, total, (t < tokens)[:, None] & (column < NOPE)[None, :])


@triton.jit
def attend_expanded(
    q, q_stride, keys, values, cache, block_table, out, out_stride, stats, rows, first_token, first_key, key_count, all_keys,
    block_elements, layer_offset, scale, NOPE: tl.constexpr, NOPE_BLOCK: tl.constexpr, ROPE: tl.constexpr,
    ROPE_BLOCK: tl.constexpr, RANK: tl.constexpr, V_DIM: tl.constexpr, V_BLOCK: tl.constexpr, BLOCK_Q: tl.constexpr,
    TOKENS: tl.constexpr, NARROW: tl.constexpr,
):  # fmt: skip
    """Goes on with out = softmax(scale (q^nope K^T + q^rope R^T)) V over a chunk of keys. Grid (blocks of rows, heads).

    Args:
        q, out: float32 [rows, heads, NOPE + ROPE] and [rows, heads, V_DIM], rows `q_stride` and `out_stride` apart.
        keys, values: float32 or bf16 [heads, key_count, NOPE] and [.., V_DIM], of tokens first_key and those after it.
        cache: float32 or bf16 [blocks, block_elements], see `latent_store.CudaLatentStore`; rotated keys R are read.
        block_table: int32 [blocks], of the sequence.
        stats: float32 [heads, rows, 2], the maximum and the sum of weights so far.
        first_token: of the rows in their sequence, of which they see the tokens up to their own.
        all_keys: tokens of the sequence; results are final where the chunk ends there.
        NOPE_BLOCK, ROPE_BLOCK, V_BLOCK: powers of two >= NOPE, ROPE and V_DIM.
    """
    head = tl.program_id(1).to(tl.int64)
    begin = tl.program_id(0) * BLOCK_Q
    row = (begin + tl.arange(0, BLOCK_Q)).to(tl.int64)
    real, token = row < rows, first_token + row
    n, r, d = tl.arange(0, NOPE_BLOCK), tl.arange(0, ROPE_BLOCK), tl.arange(0, V_BLOCK)
    own = q + row[:, None] * q_stride + head * (NOPE + ROPE)
    plain = tl.load(own + n[None, :], mask=real[:, None] & (n < NOPE)[None, :], other=0.0)
    rotated = tl.load(own + NOPE + r[None, :], mask=real[:, None] & (r < ROPE)[None, :], other=0.0)
    place = out + row[:, None] * out_stride + head * V_DIM + d[None, :]
    mask = real[:, None] & (d < V_DIM)[None, :]
    at = stats + (head * rows + row) * 2
    begun = row < tl.where(first_key > 0, rows, 0)
    maximum = tl.load(at, mask=begun, other=float("-inf"))
    weights = tl.load(at + 1, mask=begun, other=0.0)
    sums = tl.load(place, mask=mask & begun[:, None], other=0.0)
    seen_keys = tl.minimum(first_token + tl.minimum(begin + BLOCK_Q, rows) - first_key, key_count)
    for start in range(0, seen_keys, TOKENS):
        i = start + tl.arange(0, TOKENS)
        stored, key = i < key_count, first_key + i
        line = head * key_count + i.to(tl.int64)
        k = tl.load(keys + line[None, :] * NOPE + n[:, None], mask=stored[None, :] & (n < NOPE)[:, None], other=0.0)
        page = tl.load(block_table + key // 32, mask=stored, other=0).to(tl.int64)
        turned = cache + page * block_elements + layer_offset + key % 32 * (RANK + ROPE) + RANK
        shared = tl.load(turned[None, :] + r[:, None], mask=stored[None, :] & (r < ROPE)[:, None], other=0.0)
        scores = add_product(tl.zeros([BLOCK_Q, TOKENS], tl.float32), plain, k, NARROW)
        scores = add_product(scores, rotated, shared, NARROW) * scale
        seen = stored[None, :] & (key[None, :] <= token[:, None])
        weight, fade, maximum, weights = next_weights(scores, seen, maximum, weights)
        v = tl.load(values + line[:, None] * V_DIM + d[None, :], mask=stored[:, None] & (d < V_DIM)[None, :], other=0.0)
        sums = add_product(sums * fade[:, None], weight, v, NARROW)
    final = row < tl.where(first_key + key_count == all_keys, rows, 0)
    divisor = tl.where(final, weights, 1.0)
    tl.store(place, sums / divisor[:, None], mask=mask)
    tl.store(at, maximum, mask=real)
    tl.store(at + 1, weights, mask=real)


def expanded_attention(
    q: torch.Tensor,
    keys: DeviceStack,
    values: DeviceStack,
    cache: torch.Tensor,
    layer_offset: int,
    block_table: torch.Tensor,
    context: int,
    out: torch.Tensor,
    *,
    scale: float,
) -> None:
    """Latent attention of consecutive rows of one sequence; see op `mla_attention`.

    Args:
        q: float32 [rows, heads, nope + rope], contiguous.
        keys: K_h^T [rank, nope] of each head.
        values: V_h [v_dim, rank] of each head.
        block_table: int32 [blocks], of the sequence.
        context: tokens of the sequence before the rows.
        out: float32 [rows, heads, v_dim], contiguous.
    """
    rows, heads, width = q.shape
    rank, nope, v_dim, total = keys.rows, keys.cols, values.rows, context + len(q)
    narrow, rope = cache.dtype == torch.bfloat16, width - nope
    most = expanded_keys(heads, nope + v_dim)
    stats = torch.empty((heads, rows, 2), dtype=torch.float32, device=q.device)
    block_q, block = 64 if narrow else 32, 64 if keys.layout.narrow else 32
    for first in range(0, total, most):
        count = min(most, total - first)
        latents = torch.empty((count, rank), dtype=torch.float32, device=q.device)
        gather_latents[(triton.cdiv(count, _ROWS), triton.cdiv(rank, _BLOCK))](
            cache, block_table, latents, first, count, cache.stride(0), layer_offset, RANK=rank, ROPE=rope, ROWS=_ROWS,
            BLOCK=_BLOCK, num_warps=4,
        )  # fmt: skip
        expanded_k, expanded_v = (
            torch.empty((heads, count, size), dtype=cache.dtype, device=q.device) for size in (nope, v_dim)
        )
        expand_keys[(triton.cdiv(count, block), triton.cdiv(keys.row_words, block), heads)](
            latents, keys.words, expanded_k, count, keys.groups, keys.matrix_words, LAYOUT=keys.layout, RANK=rank, NOPE=nope,
            TOKENS=block, WORDS=block, LATENTS=_LATENTS, num_warps=4, num_stages=2,
        )  # fmt: skip
        sizes = tile_sizes(count, values, gated=False)
        head_tile_product[(triton.cdiv(count, sizes["BLOCK_M"]), triton.cdiv(v_dim, sizes["BLOCK_N"]), heads)](
            ordered_rows(latents, rank, values), 1, 0, values.words, expanded_v, v_dim, count * v_dim, count, v_dim,
            values.groups, values.matrix_words, LAYOUT=values.layout, **sizes, num_warps=4, num_stages=2,
        )  # fmt: skip
        attend_expanded[(triton.cdiv(rows, block_q), heads)](
            q, q.stride(0), expanded_k, expanded_v, cache, block_table, out, out.stride(0), stats, rows, context, first, count,
            total, cache.stride(0), layer_offset, scale, NOPE=nope, NOPE_BLOCK=max(16, triton.next_power_of_2(nope)),
            ROPE=rope, ROPE_BLOCK=max(16, triton.next_power_of_2(rope)), RANK=rank, V_DIM=v_dim,
            V_BLOCK=max(16, triton.next_power_of_2(v_dim)), BLOCK_Q=block_q, TOKENS=64 if narrow else 32, NARROW=narrow,
            num_warps=4 if narrow else 8, num_stages=2,
        )  # fmt: skip
