"""The dtypes that a model's weights are trained and saved in."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..integration.bind.dtypes import kept_in_fp32
from ..integration.bind.modules import Packed
from .optimizer import DeepSeekAdamW

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def set_training_dtype(model: Any, dtype: torch.dtype) -> torch.dtype:
    """Casts the floating-point parameters in place, one at a time, so that memory never holds two copies of the model.

    Buffers keep their dtype: position tables and router biases need fp32. So do parameters that the model's class lists as
    fp32. In a model with packed or quantized weights, only the trained parameters are cast, to the dtype of its activations.

    Returns: the dtype of the activations.
    """
    if any(isinstance(module, Packed) for module in model.modules()) or getattr(model, "is_quantized", False):
        activations = next((m.dtype for m in model.modules() if isinstance(m, Packed)), getattr(model, "dtype", dtype))
        for parameter in model.parameters():
            if parameter.requires_grad and parameter.is_floating_point():
                parameter.data = parameter.data.to(activations)
        return activations
    exact = kept_in_fp32(model, torch.bfloat16)
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and not exact.search(name):
            parameter.data = parameter.data.to(dtype)
    return dtype


def weights_in(model: nn.Module, dtype: torch.dtype, optimizer: DeepSeekAdamW | None) -> dict[str, torch.Tensor]:
    """The model's state dict, floating-point tensors as `dtype`. If that is fp32, trained weights are the master weights."""
    exact = optimizer is not None and dtype == torch.float32
    trained = {p.data_ptr(): p for p in model.parameters() if p.requires_grad} if exact else {}
    state = {}
    for name, tensor in model.state_dict().items():
        if optimizer is not None and tensor.data_ptr() in trained:
            tensor = optimizer.master(trained[tensor.data_ptr()])
        state[name] = tensor.to(dtype) if tensor.is_floating_point() else tensor
    return state
