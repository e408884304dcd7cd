"""torch's `scaled_mm` for products of FP8 weights with rows in FP8, on Hopper.

Packed weights stay as they are: a product of many rows writes its matrix in rows first (`kernels/scaled_product.py`). A matrix
that was unpacked once would be a second copy beside the packed one, which few rows are multiplied with and which is saved.
"""

from __future__ import annotations

from typing import Any

from ...quant.fp8 import BLOCK
from ...quant.scaled_mm import FOUR, HOPPER, OLDEST_TORCH, padded_rows, why_not
from .alternative import Alternative, ProductShape

_SCALE_BYTES = _RESULT_BYTES = 4


def _fits(product: ProductShape) -> bool:
    """Whole blocks with one scale each."""
    whole = not any(size % BLOCK for size in (product.first, product.outputs, product.columns))
    return product.format == "fp8" and product.coded and whole


def _scratch_bytes(rows: int, outputs: int, columns: int, products: int) -> int:
    """Rows in FP8, their scales again in another order, the matrix in rows with its scales, and results; of gate and up the
    matrices one after the other."""
    padded, groups = padded_rows(rows), columns // BLOCK
    coded = padded * (columns + -(-columns // 512) * 16 + _SCALE_BYTES * groups)
    matrix = outputs * columns + outputs // BLOCK * -(-groups // FOUR) * FOUR * _SCALE_BYTES
    return coded + matrix + _RESULT_BYTES * padded * outputs * products


def _launch(*args: Any, **kwargs: Any) -> None:
    from .kernels.scaled_product import launch_scaled  # imports Triton

    launch_scaled(*args, **kwargs)


# A CUDA graph may record it: torch's CUDA graphs record products of cuBLASLt, and everything else is a kernel of Triton or a
# copy on the device.
SCALED_MM = Alternative(
    "scaled_mm", "products in FP8", "torch", OLDEST_TORCH, (HOPPER,), True, _fits, _scratch_bytes, _launch, why_not
)
