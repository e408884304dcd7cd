"""out = scale x, or out + scale x, from type to type in one pass: casts and sums of gradients."""

from __future__ import annotations

import ctypes as C

import torch

from . import native


def scale_into(out: torch.Tensor, x: torch.Tensor, scale: float = 1.0, *, add: bool = False) -> torch.Tensor:
    """Puts scale x into `out` (which may be x), or adds it to that; arithmetic in fp32. Shapes are equal. Returns `out`."""
    if native.usable(out, x) and out.is_contiguous() and x.is_contiguous():
        _scale_into(out, x, scale, add)
    else:
        wide = torch.promote_types(torch.promote_types(out.dtype, x.dtype), torch.float32)
        made = x.to(wide) * scale
        out.copy_(made + out if add else made)
    return out


@torch.library.custom_op("dso::train_scale_into", mutates_args=("out",), device_types="cpu")
def _scale_into(out: torch.Tensor, x: torch.Tensor, scale: float, add: bool) -> None:
    into, source = native.numbers(out, "out"), native.numbers(x, "x")
    native.call("dso_train_scale", C.byref(source), scale, add, C.byref(into), out=out)


@_scale_into.register_fake
def _(out: torch.Tensor, x: torch.Tensor, scale: float, add: bool) -> None:
    """It changes `out`, and makes nothing."""
