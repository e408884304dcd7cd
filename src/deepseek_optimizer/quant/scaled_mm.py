"""Products of FP8 codes with scales of blocks, by torch's `scaled_mm` (cuBLASLt, Hopper).

UNVERIFIED on hardware, for lack of a device. Tests check that torch accepts the shapes, strides and dtypes (its own checks, on
meta tensors).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

OLDEST_TORCH = "2.10"  # that has `scaled_mm`
HOPPER = 9  # compute capability, major
FOUR = 4  # cuBLASLt requires columns of 128 x 128 block scales to be padded to a multiple of four
_CUDA = (12, 9)
_ROWS = 16  # rows of a are padded to a multiple: what torch requires of other dimensions, and cuBLASLt of some


def padded_rows(rows: int) -> int:
    """The rows of the product for this number of rows of a."""
    return -(-rows // _ROWS) * _ROWS


def why_not(device: torch.device) -> str | None:
    """Why block-wise products cannot run on this device; None if they can. Says what they require."""
    needs = "FP8 products with block-wise scales need NVIDIA Hopper (compute capability 9.0: H100, H200, GH200)"
    if device.type != "cuda":
        return f"{needs}, but the device is {device.type}"
    if not hasattr(F, "scaled_mm"):
        lacks = f"torch.nn.functional.scaled_mm, which torch {torch.__version__} lacks"
        return f"{needs} and {lacks}; install torch {OLDEST_TORCH} or later"
    if torch.version.hip is not None:
        return f"{needs}, but this torch is built for ROCm {torch.version.hip}"
    capability = torch.cuda.get_device_capability(device)
    if capability[0] != HOPPER:
        name = torch.cuda.get_device_name(device)
        return f"{needs}, but {name} has compute capability {capability[0]}.{capability[1]}"
    built = tuple(int(part) for part in str(torch.version.cuda).split(".")[:2])
    if built < _CUDA:
        return f"{needs} and CUDA 12.9 or later, but this torch is built for {torch.version.cuda}"
    return None


def multiply(
    a: torch.Tensor, a_scale: torch.Tensor, b: torch.Tensor, b_scale: torch.Tensor, b_blocks: bool, dtype: torch.dtype
) -> torch.Tensor:
    """a b^T [M, N], summed in fp32.

    Args:
        a: FP8 codes [M, K], K a multiple of 128, rows any multiple of 16 bytes apart.
        a_scale: float32 [M, K / 128], in column-major order.
        b: FP8 codes [N, K], N a multiple of 16, or with `b_blocks` of 128.
        b_scale: float32 [N, K / 128], or with `b_blocks` [K / 128 rounded up to a multiple of FOUR, N / 128], in column-major
            order.
        b_blocks: whether 128 rows of b share scales.
        dtype: of the result, bfloat16 or float32.
    """
    kinds: Any = getattr(F, "ScalingType")  # noqa: B009 - a torch without it is refused by why_not
    b_kind = kinds.BlockWise128x128 if b_blocks else kinds.BlockWise1x128
    return F.scaled_mm(a, b.t(), a_scale, kinds.BlockWise1x128, b_scale, b_kind, output_dtype=dtype)
