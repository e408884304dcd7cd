"""Packs a model's weights in a format, and builds the float model that has the values of those packed weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from deepseek_optimizer.quant import get_format, pack, unpack
from deepseek_optimizer.quant.packed import PackedMatrix, PackedStack, PackedWeight
from deepseek_optimizer.quant.transposed_stack import StackLayout, matrices_of, parameter_of


def packed_weights(weights: dict[str, torch.Tensor], format_name: str) -> dict[str, PackedWeight | torch.Tensor]:
    """Every matrix packed by the reference packer, experts as stacks; vectors and routers unchanged. Tied names share one
    matrix."""
    done: dict[int, PackedMatrix] = {}
    out: dict[str, PackedWeight | torch.Tensor] = {}
    for name, w in weights.items():
        if w.ndim == 3 and w.shape[1] > 1:  # not a convolution
            out[name] = _stack(name, w, format_name, _form(name, weights))
        elif w.ndim != 2 or name.endswith(("_bias", "fn", "tid2eid")) or name.split(".")[-2:] == ["gate", "weight"]:
            out[name] = w
        else:
            if w.data_ptr() not in done:
                done[w.data_ptr()] = pack(w, format_name)
            out[name] = done[w.data_ptr()]
    return out


def _form(name: str, weights: Mapping[str, Any]) -> StackLayout:
    """How a family stores its stacks: gpt-oss, which has biases, Llama 4, or others."""
    if f"{name}_bias" in weights:
        return "interleaved"
    module = name.partition(".experts.")[0]
    return "columns" if module.endswith(".feed_forward") and f"{module}.router.weight" in weights else "rows"


def _stack(name: str, w: torch.Tensor, format_name: str, layout: StackLayout) -> PackedStack:
    """[E, rows, cols] -> a stack of E matrices; of 2 E if gate and up are concatenated."""
    halves = 2 if name.endswith("gate_up_proj") else 1
    if layout != "rows":
        matrices = matrices_of(w, w.shape[2] // halves, layout).flatten(0, 1).contiguous()
    else:
        matrices = w.reshape(w.shape[0] * halves, -1, w.shape[2])
    data = torch.stack([get_format(format_name).pack(m) for m in matrices])
    return PackedStack(format_name, *matrices.shape, data)


def dequantized(weights: dict[str, PackedWeight | torch.Tensor]) -> dict[str, torch.Tensor]:
    return {n: _values(n, w, _form(n, weights)) for n, w in weights.items()}


def _values(name: str, w: PackedWeight | torch.Tensor, layout: StackLayout) -> torch.Tensor:
    if isinstance(w, PackedStack):
        halves = 2 if name.endswith("gate_up_proj") else 1
        matrices = torch.stack([unpack(w.matrix(i)) for i in range(w.count)])
        if layout != "rows":
            return parameter_of(matrices.unflatten(0, (-1, halves)), layout)
        return matrices.reshape(-1, halves * w.rows, w.cols)
    return unpack(w) if isinstance(w, PackedMatrix) else w.float()
