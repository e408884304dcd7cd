"""Norms of large activations on the backend's threads.

Layer norms are torch's. An RMS norm is recognized by its one parameter and its epsilon, and by its results on random rows,
since some families scale by one plus the weight. Only fp32 activations without a gradient are computed here, others by torch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ...backends.base import Norm
from ..bind.packed_model import NoCopyCallable
from .native_class import kind_of, native_class

_SMALLEST = 1 << 16  # elements, below which a call of torch takes less time
_EPSILONS = ("variance_epsilon", "eps")
Function = Callable[[torch.Tensor, torch.Tensor, "torch.Tensor | None", float], torch.Tensor]


class FusedNorm(nn.Module):
    """A base of the classes that `fuse_norms` makes.

    Attributes:
        fused: `Backend.norm`; None: torch's own is as fast.
    """

    fused: NoCopyCallable | None
    weight: nn.Parameter

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        x = args[0] if len(args) == 1 and not kwargs else None
        if self.fused is None or not isinstance(x, torch.Tensor) or x.numel() < _SMALLEST or not is_exact(self, x):
            return super().forward(*args, **kwargs)
        return _compute(self.fused, self, x)


def is_exact(module: FusedNorm, x: torch.Tensor) -> bool:
    """Whether the norm of x is one of fp32 numbers, without a gradient."""
    weights = [p for p in module._parameters.values() if p is not None]
    if type(x) is not torch.Tensor or torch.is_autocast_enabled("cpu"):
        return False
    if torch.is_grad_enabled() and any(t.requires_grad for t in (x, *weights)):
        return False
    return all(t.dtype == torch.float32 and t.is_cpu and t.is_contiguous() for t in (x, *weights))


def arguments_of(module: Any) -> Norm:
    """Weight, bias and epsilon of a norm."""
    epsilon = next(getattr(module, name) for name in _EPSILONS if hasattr(module, name))
    return module.weight.data, None if (bias := module._parameters.get("bias")) is None else bias.data, epsilon


def _compute(fused: Callable[..., torch.Tensor], module: Any, x: torch.Tensor) -> torch.Tensor:
    return fused(x, *arguments_of(module))


def fuse_norms(model: nn.Module, fused: Function | None) -> None:
    """Replaces the classes of the model's norms.

    Args:
        fused: see `FusedNorm`.
    """
    found: dict[Any, bool] = {}
    module: Any
    for module in list(model.modules()):
        if fused is None or isinstance(module, FusedNorm) or not _may_be(module):
            continue
        kind = kind_of(module), next(module.parameters()).dtype
        if kind not in found:
            found[kind] = type(module) is nn.LayerNorm or _is_rms_norm(module, fused)
        if found[kind]:
            module.__class__ = native_class(FusedNorm, module)
            module.fused = NoCopyCallable(fused)


def _may_be(module: Any) -> bool:
    weights = {name: p for name, p in module._parameters.items() if p is not None}
    if type(module) is nn.LayerNorm:
        return len(module.normalized_shape) == 1 and set(weights) == {"weight", "bias"}
    if set(weights) != {"weight"} or weights["weight"].dim() != 1 or module._modules or module._buffers:
        return False
    return any(isinstance(getattr(module, name, None), float) for name in _EPSILONS)


def _is_rms_norm(module: Any, fused: Function) -> bool:
    """Whether a module's result on random rows is the RMS norm's."""
    weight = module.weight
    if weight.dtype != torch.float32 or not weight.is_cpu:
        return False
    x = torch.randn(3, len(weight), generator=torch.Generator("cpu").manual_seed(0), device="cpu", dtype=torch.float32)
    try:
        with torch.no_grad():
            expected, result = module(x), _compute(fused, module, x)
    except (TypeError, RuntimeError, ValueError):  # other arguments or shapes than a norm's
        return False
    same = isinstance(expected, torch.Tensor) and expected.shape == result.shape and expected.dtype == result.dtype
    return same and torch.allclose(expected, result, rtol=1e-4, atol=1e-6)
