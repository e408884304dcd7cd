"""Finite weights that a format cannot hold.

Most formats have scales in fp16: a group with larger weights becomes NaN (int4 from about 520,000), and bf16 rounds the largest
numbers of fp32 to infinity.
"""

from __future__ import annotations

import math

import torch

from . import PackedMatrix, unpack

# Up to this magnitude nothing overflows: scales and minimums are at most twice as large, and fp16 ends at 65,504.
SAFE = 2.0**14


def largest_magnitude(values: torch.Tensor) -> float:
    """The largest magnitude among the elements; infinite or NaN if any of them is.

    Computed with numpy on the calling thread: torch's threads and the packer's would compete for the cores, which costs
    milliseconds at each switch. As integers, magnitudes are in the same order.
    """
    if not values.numel() or not values.is_floating_point():
        return 0.0
    size = values.element_size()
    whole = {2: torch.int16, 4: torch.int32, 8: torch.int64}[size]
    bits = values.detach().cpu().view(whole).numpy()
    largest = max(int(bits.max()), int(bits.view(f"u{size}").max()) - (1 << 8 * size - 1), 0)
    return float(torch.tensor(largest, dtype=whole, device="cpu").view(values.dtype))


def overflow_of(weight: torch.Tensor, tiles: torch.Tensor, format: str, largest: float | None = None) -> str | None:
    """What is wrong with a packed matrix if finite weights are not finite in its format; None: nothing.

    Args:
        weight: the float matrix [N, K].
        tiles: it, packed.
        format: the format's name.
        largest: result of `largest_magnitude`, if it is known.
    """
    largest = largest_magnitude(weight) if largest is None else largest
    if largest <= SAFE or not math.isfinite(largest):
        return None
    if bool(unpack(PackedMatrix(format, weight.shape[0], weight.shape[1], tiles)).isfinite().all()):
        return None
    wider = "fp32" if format == "bf16" else "bf16"
    return f'has weights of up to {largest:.3g}, which are too large for {format}; set formats={{NAME: "{wider}"}} for it'
