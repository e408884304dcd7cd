"""Storage types of caches, and rows that are stored as integers with scales."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ...errors import BackendError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.int8, "int4": torch.uint8}  # int4: two in a byte
SCALED = ("int8", "int4")  # with a float32 scale per row
LATENT_GROUP = 128  # elements of an int8 or int4 latent that share a scale


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


def quantized(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x quantized along its last axis to integers from -127 to 127, and their scales."""
    scale = x.abs().amax(-1) / 127
    return torch.round(x / torch.where(scale == 0, 1.0, scale)[..., None]), scale


def quantized_groups(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """As `quantized`, with a scale for each group of LATENT_GROUP elements: [..., n], [..., groups]."""
    padded = F.pad(x, (0, groups_of(x.shape[-1]) * LATENT_GROUP - x.shape[-1]))
    rows, scales = quantized(padded.unflatten(-1, (-1, LATENT_GROUP)))
    return rows.flatten(-2)[..., : x.shape[-1]], scales


def dequantized_groups(rows: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """The numbers that rows of `quantized_groups` stand for."""
    return rows * scales.repeat_interleave(LATENT_GROUP, -1)[..., : rows.shape[-1]]
