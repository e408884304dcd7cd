"""The rows of a latent cache: a norm of the latent and a rotation of the key, then the write to the paged cache."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ...reference.scaled_rows import LATENT_GROUP
from .codes import codes_of, kind_of, latent_keys, latent_scales, scale_of
from .rope import move_heads, store_as

_ROWS = 16  # tokens of a program of `store_rows`


@triton.jit
def latent_rows(
    x, weight, table, out, eps, RANK: tl.constexpr, ROPE: tl.constexpr, INTERLEAVED: tl.constexpr, BLOCK: tl.constexpr,
    ROPE_BLOCK: tl.constexpr,
):  # fmt: skip
    """out = the RMS norm of the first RANK elements of x, then its other ROPE elements rotated. Grid (tokens).

    Args:
        x, out: float32 [T, RANK + ROPE]; out may be x.
        weight: float32 [RANK].
        table: float32 [T, ROPE] of `rope_angles`.
        BLOCK, ROPE_BLOCK: powers of two >= RANK and >= ROPE.
    """
    token, i = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    row, target = x + token * (RANK + ROPE), out + token * (RANK + ROPE)
    z = tl.load(row + i, mask=i < RANK, other=0.0)
    normed = z / tl.sqrt_rn(tl.sum(z * z, 0) / RANK + eps) * tl.load(weight + i, mask=i < RANK, other=0.0)
    tl.store(target + i, normed, mask=i < RANK)
    real = tl.full([1, 1], 1, tl.int1)
    move_heads(row + RANK, target + RANK, target, table + token * ROPE, real, ROPE, ROPE, 0, INTERLEAVED, "", ROPE_BLOCK)


def latent(
    x: torch.Tensor, weight: torch.Tensor, table: torch.Tensor, eps: float, interleaved: bool, out: torch.Tensor
) -> None:
    """See `latent_rows`."""
    rank, rope = len(weight), table.shape[1]
    latent_rows[(len(x),)](
        x, weight, table, out, eps, RANK=rank, ROPE=rope, INTERLEAVED=interleaved, BLOCK=triton.next_power_of_2(rank),
        ROPE_BLOCK=triton.next_power_of_2(rope), num_warps=4,
    )  # fmt: skip


@triton.jit
def store_rows(
    x, cache, slots, tokens, block_elements, layer_offset, WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Writes the rows of x to their slots. Grid (blocks of tokens, blocks of columns).

    Args:
        x: float32 [tokens, WIDTH].
        cache: float32 or bf16 [blocks, block_elements], see `latent_store.CudaLatentStore`.
        slots: int32 [tokens], 32 * block + place of each token.
        layer_offset: where the layer begins in a block, in elements.
    """
    token = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    i = (tl.program_id(1) * BLOCK + tl.arange(0, BLOCK))[None, :]
    slot = tl.load(slots + token, mask=token < tokens, other=0)
    place = cache + (slot // 32).to(tl.int64) * block_elements + layer_offset + slot % 32 * WIDTH
    mask = (token < tokens) & (i < WIDTH)
    store_as(place + i, tl.load(x + token * WIDTH + i, mask=mask, other=0.0), mask)


@triton.jit
def store_latent_codes(
    x, cache, slots, tokens, block_bytes, layer_offset, RANK: tl.constexpr, ROPE: tl.constexpr, GROUPS: tl.constexpr,
    KIND: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Writes the codes and scales of latents, and rotated keys, to their slots. Grid (blocks of tokens, GROUPS + blocks of a
    key's elements).

    Args:
        x: float32 [tokens, RANK + ROPE].
        cache: codes of a KIND [blocks, block_bytes], see `latent_store.CudaLatentStore`.
        slots: int32 [tokens], 32 * block + place of each token.
        layer_offset: where the layer begins in a block, in bytes.
        BLOCK: elements that share a scale.
    """
    token, group = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None], tl.program_id(1)
    real = token < tokens
    slot = tl.load(slots + token, mask=real, other=0)
    layer, place = (slot // 32).to(tl.int64) * block_bytes + layer_offset, slot % 32
    if group < GROUPS:
        i = group * BLOCK + tl.arange(0, BLOCK)[None, :]
        mask = real & (i < RANK)
        values = tl.load(x + token * (RANK + ROPE) + i, mask=mask, other=0.0)
        scale = scale_of(tl.max(tl.abs(values), 1, keep_dims=True), KIND)
        scales = latent_scales(cache, layer, RANK, ROPE) + place * GROUPS + group
        tl.store(cache + layer + place * RANK + i, codes_of(values, scale, KIND).to(cache.dtype.element_ty), mask=mask)
        tl.store(scales, scale, mask=real)
    else:
        i = (group - GROUPS) * BLOCK + tl.arange(0, BLOCK)[None, :]
        mask = real & (i < ROPE)
        keys = latent_keys(cache, layer, RANK) + place * ROPE + i
        store_as(keys, tl.load(x + token * (RANK + ROPE) + RANK + i, mask=mask, other=0.0), mask)


def store_latents(x: torch.Tensor, cache: torch.Tensor, slots: torch.Tensor, layer_offset: int, rank: int) -> None:
    """Writes latents and rotated keys; see `store_latent_codes` and, for caches of floats, `store_rows`."""
    if kind_of(cache) == "":
        store(x, cache, slots, layer_offset)
        return
    tokens, rope, groups = len(x), x.shape[1] - rank, triton.cdiv(rank, LATENT_GROUP)
    store_latent_codes[(triton.cdiv(tokens, _ROWS), groups + triton.cdiv(rope, LATENT_GROUP))](
        x, cache, slots, tokens, cache.stride(0), layer_offset, RANK=rank, ROPE=rope, GROUPS=groups, KIND=kind_of(cache),
        ROWS=_ROWS, BLOCK=LATENT_GROUP, num_warps=4,
    )  # fmt: skip


def store(x: torch.Tensor, cache: torch.Tensor, slots: torch.Tensor, layer_offset: int) -> None:
    """See `store_rows`."""
    tokens, width = x.shape
    block = min(128, triton.next_power_of_2(width))
    store_rows[(triton.cdiv(tokens, _ROWS), triton.cdiv(width, block))](
        x, cache, slots, tokens, cache.stride(0), layer_offset, WIDTH=width, ROWS=_ROWS, BLOCK=block, num_warps=4
    )
