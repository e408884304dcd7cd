"""Products on FP8 tensor cores: `torch.nn.functional.scaled_mm` with block-wise scales (cuBLASLt, Hopper).

UNVERIFIED on hardware, for lack of a device. Tests check that torch accepts the shapes, strides and dtypes (its own checks, on
meta tensors), and that codes and scales equal those of the emulation.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from .quantize import BLOCK, ROW, TILE, quantize

_FOUR = 4  # cuBLASLt requires columns of 128 x 128 block scales to be padded to a multiple of four


def why_not(device: torch.device) -> str | None:
    """Why block-wise products cannot run on this device; None if they can. Says what they require."""
    needs = "FP8 products with block-wise scales need NVIDIA Hopper (compute capability 9.0: H100, H200, GH200)"
    if device.type != "cuda":
        return f"{needs}, but the device is {device.type}"
    if not hasattr(F, "scaled_mm"):
        return f"{needs} and torch.nn.functional.scaled_mm, which torch {torch.__version__} lacks; install torch 2.10 or later"
    if torch.version.hip is not None:
        return f"{needs}, but this torch is built for ROCm {torch.version.hip}"
    capability = torch.cuda.get_device_capability(device)
    if capability[0] != 9:
        name = torch.cuda.get_device_name(device)
        return f"{needs}, but {name} has compute capability {capability[0]}.{capability[1]}"
    built = tuple(int(part) for part in str(torch.version.cuda).split(".")[:2])
    if built < (12, 9):
        return f"{needs} and CUDA 12.9 or later, but this torch is built for {torch.version.cuda}"
    return None


def multiply(a: torch.Tensor, b: torch.Tensor, a_dtype: torch.dtype, b_dtype: torch.dtype, b_blocks: bool) -> torch.Tensor:
    """a b^T [M, N] in bf16, summed in fp32.

    Args:
        a: [M, K], to be quantized in 1 x 128 tiles.
        b: [N, K], to be quantized in 128 x 128 blocks if `b_blocks` (a weight), else in 1 x 128 tiles.
        a_dtype, b_dtype: FP8 formats of the codes.
    """
    M, N = a.shape[0], b.shape[0]
    a, b = _padded(a), _padded(b)
    a_codes, a_scale = quantize(a, ROW, a_dtype)
    b_codes, b_scale = quantize(b, BLOCK if b_blocks else ROW, b_dtype)
    kinds: Any = getattr(F, "ScalingType")  # noqa: B009 - a torch without it is refused by why_not
    result = F.scaled_mm(
        a_codes, b_codes.t(),
        _columns(a_scale), kinds.BlockWise1x128,
        _columns_of_four(b_scale) if b_blocks else _columns(b_scale),
        kinds.BlockWise128x128 if b_blocks else kinds.BlockWise1x128,
        output_dtype=torch.bfloat16,
    )  # fmt: skip
    return result[:M, :N]


def _padded(x: torch.Tensor) -> torch.Tensor:
    """Pads both dimensions with zeros to multiples of 128, so that all tiles are full; the zeros change no sum."""
    missing = (0, -x.shape[1] % TILE, 0, -x.shape[0] % TILE)
    return F.pad(x, missing) if any(missing) else x


def _columns(scale: torch.Tensor) -> torch.Tensor:
    """[R, K / 128] in column-major order."""
    return scale.t().contiguous().t()


def _columns_of_four(scale: torch.Tensor) -> torch.Tensor:
    """[N / 128, K / 128] -> [K / 128 rounded up to a multiple of four, N / 128], in column-major order."""
    return F.pad(scale, (0, -scale.shape[1] % _FOUR)).t()
