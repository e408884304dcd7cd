"""Rotary position embedding (Su and others, "RoFormer", arXiv 2104.09864) of queries or keys, all heads of a token in one go.

Of a head's first numbers, as many as `cos` has, pair i is numbers (i, i + half). Interleaved, as DeepSeek's checkpoints have
it, it is (2i, 2i + 1), and the result goes to (i, i + half), where Transformers puts it: products of q and k are the same. The
backward is the transpose, and keeps nothing but cos and sin. Arithmetic in fp32, rounded once.
"""

from __future__ import annotations

import ctypes as C
from typing import Any

import torch

from ...backends.cpu.buffers import address, strided
from ...backends.cpu.native_train import TrainRotation
from . import native


def rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool = False) -> torch.Tensor:
    """x [B, H, S, D], of any strides -> the same shape, in x's order in memory.

    Args:
        cos, sin: [B, S, R], or B = 1 for all rows, as Transformers' rotary modules make them, R even and at most D; numbers
            of a head from R on are passed through.
        interleaved: how pairs lie in x.

    Raises:
        ValueError: shapes that do not fit each other.
    """
    _check(x, cos, sin)
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    if not native.usable(x, cos, sin) or cos.requires_grad or sin.requires_grad:
        return rope_reference(x, cos, sin, interleaved)
    return _rope(x, cos, sin, interleaved, False)


def rope_reference(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool = False) -> torch.Tensor:
    """The same in plain torch."""
    width = cos.shape[-1]
    half, wide = width // 2, torch.promote_types(x.dtype, torch.float32)
    head, c, s = x[..., :width].to(wide), cos.unsqueeze(1).to(wide), sin.unsqueeze(1).to(wide)
    a, b = (head[..., 0::2], head[..., 1::2]) if interleaved else (head[..., :half], head[..., half:])
    left, right = a * c[..., :half] - b * s[..., :half], b * c[..., half:] + a * s[..., half:]
    return torch.cat((left.to(x.dtype), right.to(x.dtype), x[..., width:]), -1)


def _check(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
    shapes = f"rope: x is {list(x.shape)}, cos {list(cos.shape)}, sin {list(sin.shape)}"
    if x.dim() != 4 or cos.dim() != 3 or cos.shape != sin.shape:
        raise ValueError(f"{shapes}: x must be [B, H, S, D], cos and sin [B, S, R]")
    if cos.shape[0] not in (1, x.shape[0]) or cos.shape[1] != x.shape[2] or cos.shape[2] > x.shape[3] or cos.shape[2] % 2:
        raise ValueError(f"{shapes}: batch and tokens must agree, and R be even and at most D")


# ---- as torch knows them


@torch.library.custom_op("dso::train_rope", mutates_args=(), device_types="cpu")
def _rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool, backward: bool) -> torch.Tensor:
    x = x if x.stride(-1) == 1 else x.contiguous()
    out, cos, sin = _empty(x), cos.contiguous(), sin.contiguous()
    (batch, heads, tokens, width), angles = x.shape, 0 if cos.shape[0] == 1 else cos.stride(0)
    rotation = TrainRotation(
        batch, tokens, heads, width, cos.shape[2] // 2,
        x.stride(0), x.stride(2), x.stride(1), out.stride(0), out.stride(2), out.stride(1), angles, cos.stride(1),
        native.type_of(x), 1, interleaved, backward,
    )  # fmt: skip
    angle_places = (address(t, name, x.dtype, tuple(cos.shape)) for t, name in ((cos, "cos"), (sin, "sin")))
    places = (strided(t, name, x.dtype, tuple(x.shape)) for t, name in ((x, "x"), (out, "out")))
    source, target = places
    native.call("dso_train_rope", C.byref(rotation), source, *angle_places, target, out=out)
    return out


@_rope.register_fake
def _(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool, backward: bool) -> torch.Tensor:
    return _empty(x)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    _, cos, sin, ctx.interleaved, ctx.backward = inputs
    ctx.save_for_backward(cos, sin)


def _gradients(ctx: Any, dy: torch.Tensor) -> tuple[Any, ...]:
    cos, sin = ctx.saved_tensors
    return _rope(dy, cos, sin, ctx.interleaved, not ctx.backward), None, None, None, None


_rope.register_autograd(_gradients, setup_context=_keep)


def _empty(x: torch.Tensor) -> torch.Tensor:
    """Of x's shape, dense, [B, S, H, D] in memory where x is a transposed view of that."""
    if x.stride(1) < x.stride(2):
        return native.new((x.shape[0], x.shape[2], x.shape[1], x.shape[3]), x).transpose(1, 2)
    return native.new(x.shape, x)
