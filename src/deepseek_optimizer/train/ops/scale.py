"""out = scale x, or out += scale x, between dtypes in one pass: for casting and summing gradients."""

from __future__ import annotations

import ctypes as C

import torch

from . import native


def scale_into(out: torch.Tensor, x: torch.Tensor, scale: float = 1.0, *, add: bool = False) -> torch.Tensor:
    """Writes scale x to `out`, which has the same shape and may be x. Computed in fp32.

    Args:
        add: add to `out` instead of overwriting it.

    Returns: `out`.
    """
    if native.usable(out, x) and out.is_contiguous() and x.is_contiguous():
        _scale_into(out, x, scale, add)
    else:
        wide = torch.promote_types(torch.promote_types(out.dtype, x.dtype), torch.float32)
        scaled = x.to(wide) * scale
        out.copy_(scaled + out if add else scaled)
    return out


@torch.library.custom_op("dso::train_scale_into", mutates_args=("out",), device_types="cpu")
def _scale_into(out: torch.Tensor, x: torch.Tensor, scale: float, add: bool) -> None:
    target, source = native.numbers(out, "out"), native.numbers(x, "x")
    native.call("dso_train_scale", C.byref(source), scale, add, C.byref(target), out=out)


@_scale_into.register_fake
def _(out: torch.Tensor, x: torch.Tensor, scale: float, add: bool) -> None:
    """Changes `out` in place; has no output."""
