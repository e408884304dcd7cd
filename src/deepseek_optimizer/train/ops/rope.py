"""Rotary position embedding (Su et al., "RoFormer", arXiv 2104.09864) of queries or keys, for all heads of a token at once.

Only the first R elements of a head are rotated, where R is the width of `cos`. Pair i is elements (i, i + R / 2). With the
interleaved layout of DeepSeek's checkpoints it is (2i, 2i + 1), and the result is stored at (i, i + R / 2) as in Transformers,
which does not change the products of q and k. The backward pass is the transpose, and saves only cos and sin. Computed in fp32
and rounded once.
"""

from __future__ import annotations

import ctypes as C
from typing import Any

import torch

from ...backends.cpu.buffers import address, strided
from ...backends.cpu.native_train import TrainRotation
from . import native, triton_ops


def rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool = False) -> torch.Tensor:
    """x [B, H, S, D], of any strides -> the same shape, in x's order in memory.

    Args:
        cos, sin: [B, S, R] or [1, S, R], as returned by Transformers' rotary modules; R is even and at most D. Elements of a
            head from R on are copied unchanged.
        interleaved: whether pairs are interleaved in x.

    Raises:
        ValueError: shapes do not match.
    """
    _check(x, cos, sin)
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    fixed = not cos.requires_grad and not sin.requires_grad
    if fixed and triton_ops.usable(x, cos, sin):
        return triton_ops.rope(x, cos, sin, interleaved)
    if not native.usable(x, cos, sin) or not fixed:
        return rope_reference(x, cos, sin, interleaved)
    return _rope(x, cos, sin, interleaved, False)


def rope_reference(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool = False) -> torch.Tensor:
    """`rope` in plain torch."""
    width = cos.shape[-1]
    half, wide = width // 2, torch.promote_types(x.dtype, torch.float32)
    head, c, s = x[..., :width].to(wide), cos.unsqueeze(1).to(wide), sin.unsqueeze(1).to(wide)
    a, b = (head[..., 0::2], head[..., 1::2]) if interleaved else (head[..., :half], head[..., half:])
    left, right = a * c[..., :half] - b * s[..., :half], b * c[..., half:] + a * s[..., half:]
    return torch.cat((left.to(x.dtype), right.to(x.dtype), x[..., width:]), -1)


def _check(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
    shapes = f"rope: x is {list(x.shape)}, cos {list(cos.shape)}, sin {list(sin.shape)}"
    if x.dim() != 4 or cos.dim() != 3 or cos.shape != sin.shape:
        raise ValueError(f"{shapes}; x must be [B, H, S, D], cos and sin [B, S, R]")
    if cos.shape[0] not in (1, x.shape[0]) or cos.shape[1] != x.shape[2] or cos.shape[2] > x.shape[3] or cos.shape[2] % 2:
        raise ValueError(f"{shapes}; B and S must match, and R must be even and at most D")


# ---- registration as torch ops


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


def _save(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    _, cos, sin, ctx.interleaved, ctx.backward = inputs
    ctx.save_for_backward(cos, sin)


def _gradients(ctx: Any, dy: torch.Tensor) -> tuple[Any, ...]:
    cos, sin = ctx.saved_tensors
    return _rope(dy, cos, sin, ctx.interleaved, not ctx.backward), None, None, None, None


_rope.register_autograd(_gradients, setup_context=_save)


def _empty(x: torch.Tensor) -> torch.Tensor:
    """A contiguous tensor of x's shape; with the memory layout [B, S, H, D] if x is a transposed view of that."""
    if x.stride(1) < x.stride(2):
        return native.new((x.shape[0], x.shape[2], x.shape[1], x.shape[3]), x).transpose(1, 2)
    return native.new(x.shape, x)
