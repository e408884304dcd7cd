"""Feed-forward blocks with the norm before them and the addition after them, `x + block(norm(x))`, in one native call.

Some families have a module for this (T5's do). It is recognized by its parts, a norm and a feed-forward block that run natively
and dropout, and by its results on random rows. As with the block itself, only its class is replaced by a subclass, and
Transformers' own forward runs where it is needed. Only fp32 activations are computed here.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as torch_module

from .feed_forward import ERROR, ROWS, FusedFeedForward, acts
from .native_class import kind_of, native_class
from .norms import FusedNorm, arguments_of, is_exact


class FusedResidual(nn.Module):
    """A module whose forward is one native call; a base of the classes that `fuse_residuals` makes."""

    _norm: str
    _block: str

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        x = args[0] if len(args) == 1 and not kwargs else None
        if isinstance(x, torch.Tensor) and self._is_plain(x):
            return _compute(self, self._norm, self._block, x)
        return super().forward(*args, **kwargs)

    def _is_plain(self, x: torch.Tensor) -> bool:
        children: dict[str, Any] = self._modules
        norm, block = children[self._norm], children[self._block]
        if self.training or torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks:
            return False
        if not isinstance(norm, FusedNorm) or not isinstance(block, FusedFeedForward) or any(map(acts, children.values())):
            return False
        return norm.fused is not None and is_exact(norm, x) and block.fused is not None and block.is_plain(x)


def _compute(module: nn.Module, norm: str, block: str, x: torch.Tensor) -> torch.Tensor:
    children: Any = module._modules
    result: torch.Tensor = children[block].compute(x, norm=arguments_of(children[norm]), residual=True)
    return result


def fuse_residuals(model: nn.Module) -> None:
    """Replaces the classes of these modules. Norms and feed-forward blocks must have been replaced before."""
    found: dict[Any, bool] = {}
    module: Any
    for module in list(model.modules()):
        if isinstance(module, FusedResidual) or (parts := _parts(module)) is None:
            continue
        block = module._modules[parts[1]]
        kind = *kind_of(module), kind_of(block)
        if kind not in found:
            found[kind] = _is(module, *parts)
        if found[kind]:
            module.__class__ = native_class(FusedResidual, module)
            module._norm, module._block = parts


def _parts(module: nn.Module) -> tuple[str, str] | None:
    """Names of the norm and of the block; None: the module has other parts."""
    names: dict[type, list[str]] = {FusedNorm: [], FusedFeedForward: []}
    for name, child in module.named_children():
        kind = next((kind for kind in names if isinstance(child, kind)), None)
        if kind is not None:
            names[kind].append(name)
        elif type(child) not in (nn.Dropout, nn.Identity):
            return None
    if module._parameters or module._buffers or any(len(found) != 1 for found in names.values()):
        return None
    return names[FusedNorm][0], names[FusedFeedForward][0]


def _is(module: Any, norm: str, block: str) -> bool:
    """Whether a module computes `x + block(norm(x))`."""
    width = len(module._modules[norm].weight)
    generator = torch.Generator("cpu").manual_seed(0)
    # Far from what a norm returns, which may be added instead.
    x = 4 * torch.randn(1, ROWS, width, generator=generator, device="cpu", dtype=torch.float32) + 2
    training = module.training
    try:
        module.eval()
        with torch.no_grad():
            expected, result = module(x), _compute(module, norm, block, x)
    except (TypeError, RuntimeError, ValueError):  # other arguments or shapes
        return False
    finally:
        module.train(training)
    if not isinstance(expected, torch.Tensor) or expected.shape != x.shape or expected.dtype != x.dtype:
        return False
    added = expected - x  # what the block adds may be small
    moved = (added - added.mean(1, keepdim=True)).abs().max()
    return bool(0 < moved and (expected - result).abs().max() <= ERROR * moved)
