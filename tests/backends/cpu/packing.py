"""A model's weights in a format, and a float model that holds the values those weights stand for."""

from __future__ import annotations

import torch

from deepseek_optimizer.quant import get_format
from deepseek_optimizer.quant.packed import PackedMatrix


def packed_weights(weights: dict[str, torch.Tensor], format_name: str) -> dict[str, PackedMatrix | torch.Tensor]:
    """Every matrix packed by the reference packer; vectors as they are. Tied names share one matrix."""
    fmt = get_format(format_name)
    done: dict[int, PackedMatrix] = {}
    out: dict[str, PackedMatrix | torch.Tensor] = {}
    for name, w in weights.items():
        if w.ndim != 2:
            out[name] = w
            continue
        if w.data_ptr() not in done:
            done[w.data_ptr()] = PackedMatrix(format_name, *w.shape, fmt.pack(w))
        out[name] = done[w.data_ptr()]
    return out


def dequantised(weights: dict[str, PackedMatrix | torch.Tensor]) -> dict[str, torch.Tensor]:
    return {
        n: get_format(w.format).unpack(w.data, w.rows, w.cols) if isinstance(w, PackedMatrix) else w.float()
        for n, w in weights.items()
    }
