"""Storage types of caches, and rows that are stored as codes with scales.

An int8 code is an integer from -127 to 127, an fp8 code the bits of a number in E4M3 (OCP 8-bit Floating Point Specification,
table 1: 4 bits of exponent with bias 7, 3 of the mantissa, no infinities, at most 448). A row's scale makes its largest element
the largest code. So an element x of a row with scale s has an error of at most s / 2 in int8; in fp8 of at most |x| / 16, or
s / 1024 if that is larger, since numbers below s / 64 are subnormal, in steps of s / 512.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ...errors import BackendError

DTYPES = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "int8": torch.int8,
    "fp8": torch.uint8,
    "int4": torch.uint8,  # two in a byte
}
SCALED = ("int8", "fp8", "int4")  # with a float32 scale per row
LARGEST = {"int8": 127, "fp8": 448}  # what a code may stand for, before scaling
LATENT_GROUP = 128  # elements of a latent that share a scale


def dtype_of(kv_dtype: str) -> torch.dtype:
    """The dtype of the elements of a cache."""
    try:
        return DTYPES[kv_dtype]
    except KeyError:
        raise BackendError(f"unknown KV cache dtype {kv_dtype!r}; choose one of {', '.join(DTYPES)}") from None


def packed_elements(kv_dtype: str) -> int:
    """Elements of a cache in one element of a tensor."""
    return 2 if kv_dtype == "int4" else 1


def unquantized(dtype: torch.dtype) -> torch.dtype:
    """The dtype of what a cache with elements of `dtype` does not quantize."""
    return torch.bfloat16 if dtype in (torch.int8, torch.uint8) else dtype


def groups_of(elements: int) -> int:
    """Number of groups with a scale each."""
    return -(-elements // LATENT_GROUP)


def quantized(x: torch.Tensor, kv_dtype: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The codes of the numbers nearest to x, half to even, and the scales of rows along its last axis.

    Args:
        x: float32 [..., n].
        kv_dtype: "int8" or "fp8".

    Returns: int8 or uint8 [..., n], float32 [...].
    """
    scale = x.abs().amax(-1) / LARGEST[kv_dtype]
    numbers = x / torch.where(scale == 0, 1.0, scale)[..., None]
    if kv_dtype == "int8":
        return torch.round(numbers).to(torch.int8), scale
    return numbers.clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8), scale  # a subnormal scale may be too small


def dequantized(codes: torch.Tensor, scales: torch.Tensor, kv_dtype: str) -> torch.Tensor:
    """The rows of `quantized`, float32 [..., n]."""
    return _numbers(codes, kv_dtype) * scales[..., None]


def quantized_groups(x: torch.Tensor, kv_dtype: str = "int8") -> tuple[torch.Tensor, torch.Tensor]:
    """As `quantized`, with a scale for each group of LATENT_GROUP elements: [..., n], [..., groups]."""
    padded = F.pad(x, (0, groups_of(x.shape[-1]) * LATENT_GROUP - x.shape[-1]))
    rows, scales = quantized(padded.unflatten(-1, (-1, LATENT_GROUP)), kv_dtype)
    return rows.flatten(-2)[..., : x.shape[-1]], scales


def dequantized_groups(codes: torch.Tensor, scales: torch.Tensor, kv_dtype: str = "int8") -> torch.Tensor:
    """The rows of `quantized_groups`, float32 [..., n]."""
    return _numbers(codes, kv_dtype) * scales.repeat_interleave(LATENT_GROUP, -1)[..., : codes.shape[-1]]


def in_fp8(x: torch.Tensor) -> torch.Tensor:
    """Rows rounded to E4M3 with a scale for each 128 elements, as products in FP8 read them: float [..., n] of x's dtype."""
    return dequantized_groups(*quantized_groups(x.float(), "fp8"), "fp8").to(x.dtype)


def _numbers(codes: torch.Tensor, kv_dtype: str) -> torch.Tensor:
    return codes.float() if kv_dtype == "int8" else codes.view(torch.float8_e4m3fn).float()
