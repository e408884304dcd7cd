"""Products on FP8 tensor cores: `torch.nn.functional.scaled_mm` with scales by blocks (cuBLASLt, Hopper).

UNVERIFIED on a device: no machine of ours has one. What is tested is that torch accepts shapes, strides and dtypes (its own
checks, on tensors without data), and that codes and scales are those of the emulation.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from .quantise import BLOCK, ROW, TILE, quantise

_FOUR = 4  # cuBLASLt wants the scales of 128 x 128 blocks in columns of a multiple of four


def why_not(device: torch.device) -> str | None:
    """Why products by blocks can't run on this device; None if they can. Names what can."""
    needs = "FP8 products with scales by blocks run on NVIDIA Hopper (compute capability 9.0: H100, H200, GH200)"
    if device.type != "cuda":
        return f"{needs}, and the device is {device.type}"
    if not hasattr(F, "scaled_mm"):
        return (
            f"{needs} through torch.nn.functional.scaled_mm, which torch {torch.__version__} has not: take torch 2.10 or later"
        )
    if torch.version.hip is not None:
        return f"{needs}, and this torch is built for ROCm {torch.version.hip}"
    capability = torch.cuda.get_device_capability(device)
    if capability[0] != 9:
        name = torch.cuda.get_device_name(device)
        return f"{needs}, and {name} has compute capability {capability[0]}.{capability[1]}"
    built = tuple(int(part) for part in str(torch.version.cuda).split(".")[:2])
    if built < (12, 9):
        return f"{needs} with CUDA 12.9 or later, and this torch is built for {torch.version.cuda}"
    return None


def multiply(a: torch.Tensor, b: torch.Tensor, a_dtype: torch.dtype, b_dtype: torch.dtype, b_blocks: bool) -> torch.Tensor:
    """A B^T with fp32 sums, bf16.

    Args:
        a: [M, K], quantised along rows.
        b: [N, K], by blocks of 128 x 128 (`b_blocks`: a weight) or along rows.
    """
    M, N = a.shape[0], b.shape[0]
    a, b = _padded(a), _padded(b)
    a_codes, a_scale = quantise(a, ROW, a_dtype)
    b_codes, b_scale = quantise(b, BLOCK if b_blocks else ROW, b_dtype)
    kinds: Any = getattr(F, "ScalingType")  # noqa: B009 - a torch without it is refused by why_not
    found = F.scaled_mm(
        a_codes, b_codes.t(),
        _columns(a_scale), kinds.BlockWise1x128,
        _columns_of_four(b_scale) if b_blocks else _columns(b_scale),
        kinds.BlockWise128x128 if b_blocks else kinds.BlockWise1x128,
        output_dtype=torch.bfloat16,
    )  # fmt: skip
    return found[:M, :N]


def _padded(x: torch.Tensor) -> torch.Tensor:
    """Zeros up to multiples of 128 in both dimensions: they add nothing, and tiles have no edges."""
    missing = (0, -x.shape[1] % TILE, 0, -x.shape[0] % TILE)
    return F.pad(x, missing) if any(missing) else x


def _columns(scale: torch.Tensor) -> torch.Tensor:
    """[R, K / 128], column after column."""
    return scale.t().contiguous().t()


def _columns_of_four(scale: torch.Tensor) -> torch.Tensor:
    """[N / 128, K / 128] -> [K / 128 rounded up to four, N / 128], column after column."""
    return F.pad(scale, (0, -scale.shape[1] % _FOUR)).t()
