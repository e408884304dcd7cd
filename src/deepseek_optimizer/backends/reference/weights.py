"""The weights of a plan as dense tensors, and how the rows that they are multiplied with are rounded."""

from __future__ import annotations

import torch

from ...errors import BackendError
from ...quant.packed import PackedMatrix, PackedStack, PackedWeight


def as_dense(weight: PackedWeight | torch.Tensor, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """The weight as float; a stack as [count, rows, cols]."""
    if isinstance(weight, PackedStack):
        return torch.stack([as_dense(weight.matrix(i), device, dtype) for i in range(weight.count)])
    if isinstance(weight, PackedMatrix):
        from ...quant import unpack

        weight = unpack(weight)
    return weight.detach().to(device, dtype)


def rounding_of(format_name: str | None, requested: str | None) -> str | None:
    """The rounding of rows before a product with a weight of this format; None for no rounding. "e4m3" is of FP8 weights."""
    if requested not in (None, "format", "bf16", "q8", "q16", "e4m3"):
        raise BackendError(f"unknown rounding {requested!r}; choose one of None, 'format', 'bf16', 'q8', 'q16', 'e4m3'")
    if requested == "e4m3":
        return requested if format_name == "fp8" else None
    if requested != "format":
        return requested
    if format_name is None:
        return None
    from ...quant import get_format

    kind = get_format(format_name).activation
    return None if kind == "f32" else kind
