"""Rotary position embedding, and writing keys and values to the paged cache.

`rotate_and_store` does both in one launch, so that keys go to the cache without a copy in between. One program is one head of a
few tokens. Each element is read by the program that writes it, and not after that, so the result may overwrite the input.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .angles import cos_and_sin
from .codes import codes_of, kind_of, scale_of
from .paged import scales_of
from .precision import nearest_bf16

_ROWS = 16  # tokens of a program


@triton.jit
def rope_angles(
    positions, which, axes, frequencies, out, tokens, scaling, HALF: tl.constexpr, AXES: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """cos and sin of position * frequency, times `scaling`. Grid (blocks of tokens).

    The angle is an fp32 product, as in Transformers; its cosine is taken in fp64, since fp32 loses digits of large angles. This
    runs once a step, not once a layer.

    Args:
        positions: int32 [tokens], with AXES [3, tokens].
        axes: int32 [HALF], with AXES that of each frequency.
        which: int32 [tokens], the row of `frequencies` of each token.
        frequencies: float32 [F, HALF].
        out: float32 [tokens, 2 * HALF], cos first.
        BLOCK: a power of two >= HALF.
    """
    token, i = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None], tl.arange(0, BLOCK)[None, :]
    inside = (token < tokens) & (i < HALF)
    row = tl.load(which + token, mask=token < tokens, other=0)
    source = positions + token
    if AXES:
        source += tl.load(axes + i, mask=i < HALF, other=0) * tokens
    position = tl.load(source, mask=inside if AXES else token < tokens, other=0).to(tl.float32)
    angle = (position * tl.load(frequencies + row * HALF + i, mask=inside, other=0.0)).to(tl.float64)
    place = out + token * (2 * HALF) + i
    cos, sin = cos_and_sin(angle)
    tl.store(place, (cos * scaling).to(tl.float32), mask=inside)
    tl.store(place + HALF, (sin * scaling).to(tl.float32), mask=inside)


def rope_table(
    positions: torch.Tensor,
    which: torch.Tensor,
    frequencies: torch.Tensor,
    scaling: float,
    out: torch.Tensor,
    axes: torch.Tensor | None = None,
) -> None:
    """See `rope_angles`; without `axes`, tokens have one position each."""
    tokens, half = len(which), frequencies.shape[1]
    rope_angles[(triton.cdiv(tokens, _ROWS),)](
        positions, which, positions if axes is None else axes, frequencies, out, tokens, scaling, HALF=half,
        AXES=axes is not None, ROWS=_ROWS, BLOCK=triton.next_power_of_2(half), num_warps=4,
    )  # fmt: skip


@triton.jit
def store_as(out, value, mask):
    """Stores float32 values as the type that `out` points to; to bf16 rounded to nearest."""
    if out.dtype.element_ty == tl.bfloat16:
        value = nearest_bf16(value)
    tl.store(out, value.to(out.dtype.element_ty), mask=mask)


@triton.jit
def move_heads(
    x, out, scale, angles, real, HEAD: tl.constexpr, ROT: tl.constexpr, OFFSET: tl.constexpr, INTERLEAVED: tl.constexpr,
    KIND: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out = x with ROT of HEAD elements rotated, from OFFSET on, for a block of rows.

    Args:
        x: pointers to float32 [HEAD] of each row, [ROWS, 1]; out: likewise, of any float
            type, possibly to the same elements, or of codes.
        scale: pointers to the scale of each row, [ROWS, 1], written with codes.
        angles: pointers to [ROT] of each row, cos first.
        real: bool [ROWS, 1], False where there is no row.
        KIND: of codes, see `codes.kind_of`; "": `out` has floats.
        BLOCK: a power of two >= HEAD.
    """
    i = tl.arange(0, BLOCK)[None, :]
    largest = tl.zeros([1, 1], tl.float32)
    rest = real & ((i < OFFSET) | (i >= OFFSET + ROT)) & (i < HEAD)
    others = tl.load(x + i, mask=rest, other=0.0)
    if KIND != "":
        largest = tl.max(tl.abs(others), 1, keep_dims=True)
    if ROT > 0:
        pair = real & (i < ROT // 2)
        first = OFFSET + (i * 2 if INTERLEAVED else i)
        second = first + 1 if INTERLEAVED else first + ROT // 2
        a, b = tl.load(x + first, mask=pair, other=0.0), tl.load(x + second, mask=pair, other=0.0)
        cos, sin = tl.load(angles + i, mask=pair, other=0.0), tl.load(angles + ROT // 2 + i, mask=pair, other=0.0)
        turned, other = a * cos - b * sin, b * cos + a * sin
        if KIND != "":
            largest = tl.maximum(largest, tl.max(tl.maximum(tl.abs(turned), tl.abs(other)), 1, keep_dims=True))
            turned, other = codes_of(turned, scale_of(largest, KIND), KIND), codes_of(other, scale_of(largest, KIND), KIND)
        store_as(out + first, turned, pair)
        store_as(out + second, other, pair)
    if KIND != "":
        others = codes_of(others, scale_of(largest, KIND), KIND)
        tl.store(scale, scale_of(largest, KIND), mask=real)
    store_as(out + i, others, rest)


@triton.jit
def rotate_and_store(
    q, k, v, table, y, cache, slots, tokens, block_elements, layer_offset, HEADS: tl.constexpr, KV_HEADS: tl.constexpr,
    HEAD: tl.constexpr, ROT: tl.constexpr, OFFSET: tl.constexpr, INTERLEAVED: tl.constexpr, KIND: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """y = rope(q); the cache's keys = rope(k), its values = v. Grid (blocks of tokens, HEADS + 2 * KV_HEADS).

    Args:
        q, y: float32 [tokens, HEADS * HEAD]; y may be q. HEADS is 0: there is no q.
        k, v: float32 [tokens, KV_HEADS * HEAD]. KV_HEADS is 0: nothing is written to the cache.
        table: float32 [tokens, ROT] of `rope_angles`; ROT is 0: nothing is rotated.
        cache: float32, bf16, or codes of a KIND [blocks, block_elements], see `store.CudaStore`.
        slots: int32 [tokens], 32 * block + place of each token.
        layer_offset: where the layer begins in a block, in elements.
    """
    token, head = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None], tl.program_id(1)
    angles, real = table + token * ROT, token < tokens
    if head < HEADS:
        at = (token * HEADS + head) * HEAD
        move_heads(q + at, y + at, y + token, angles, real, HEAD, ROT, OFFSET, INTERLEAVED, "", BLOCK)
    elif KV_HEADS > 0:
        row = head - HEADS  # keys' heads, then values'
        slot = tl.load(slots + token, mask=real, other=0)
        layer = (slot // 32).to(tl.int64) * block_elements + layer_offset
        place = cache + layer + (row * 32 + slot % 32) * HEAD
        scale = y + token
        if KIND != "":
            scale = scales_of(cache, layer, KV_HEADS, HEAD) + row * 32 + slot % 32
        if row < KV_HEADS:
            x = k + (token * KV_HEADS + row) * HEAD
            move_heads(x, place, scale, angles, real, HEAD, ROT, OFFSET, INTERLEAVED, KIND, BLOCK)
        else:
            x = v + (token * KV_HEADS + row - KV_HEADS) * HEAD
            move_heads(x, place, scale, angles, real, HEAD, 0, 0, INTERLEAVED, KIND, BLOCK)


def rope(x: torch.Tensor, table: torch.Tensor, heads: int, interleaved: bool, y: torch.Tensor, offset: int = 0) -> None:
    """y = x, float32 [T, heads * head], with elements of each head rotated, from `offset` on; y may be x."""
    head = x.shape[1] // heads
    rotate_and_store[(triton.cdiv(len(x), _ROWS), heads)](
        x, x, x, table, y, x, x, len(x), 0, 0, HEADS=heads, KV_HEADS=0, HEAD=head, ROT=table.shape[1], OFFSET=offset,
        INTERLEAVED=interleaved, KIND="", ROWS=_ROWS, BLOCK=triton.next_power_of_2(head), num_warps=4,
    )  # fmt: skip


def rope_cache(
    q: torch.Tensor | None,
    k: torch.Tensor,
    v: torch.Tensor,
    table: torch.Tensor | None,
    y: torch.Tensor | None,
    cache: torch.Tensor,
    slots: torch.Tensor,
    layer_offset: int,
    *,
    heads: int,
    kv_heads: int,
    interleaved: bool = False,
) -> None:
    """See `rotate_and_store`; without q and y, only keys and values are written, without a table as they are."""
    tokens, head = len(k), k.shape[1] // kv_heads
    heads = 0 if q is None else heads
    rotate_and_store[(triton.cdiv(tokens, _ROWS), heads + 2 * kv_heads)](
        k if q is None else q, k, v, k if table is None else table, k if y is None else y, cache, slots, tokens,
        cache.stride(0), layer_offset, HEADS=heads, KV_HEADS=kv_heads, HEAD=head, ROT=0 if table is None else table.shape[1],
        OFFSET=0, INTERLEAVED=interleaved, KIND=kind_of(cache), ROWS=_ROWS, BLOCK=triton.next_power_of_2(head), num_warps=4,
    )  # fmt: skip
