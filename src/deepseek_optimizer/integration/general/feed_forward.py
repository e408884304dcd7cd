"""Feed-forward blocks in one native call: two products with an activation between them, whose result is never stored in fp32.

A block is recognized by its parts: packed linear layers from K to N and from N to M, or two of the former (a gated block), one
activation that the backend has, and dropout. How its class connects them is not known, so one block of each kind is computed
both ways on random rows. The class of a block that fits is replaced by a subclass: `isinstance`, names, parameters, hooks and
saving keep working. Where Transformers' own forward is needed (gradients, training, layers that an adapter wraps, modules that
have hooks), it runs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as torch_module

from ..bind.packed_model import NoCopyCallable
from .modules import GeneralConv1D, GeneralLinear
from .native_class import kind_of, native_class

_TANH, _ERF = ("gelu", "geglu"), ("gelu_erf", None)
# Activations by class name: the op after one product, and the op of a gated block.
_OPS: dict[str, tuple[str | None, str | None]] = {
    "FastGELUActivation": _TANH, "GELUTanh": _TANH, "NewGELUActivation": _TANH, "GELUActivation": _ERF, "GELU": _ERF,
    "ReLU": ("relu", None), "SiLU": (None, "swiglu"), "SiLUActivation": (None, "swiglu"),
}  # fmt: skip
ERROR = 1 / 32  # of the difference between rows, by which the two ways may differ: the rounding of a few activations of 8 bits
ROWS = 3  # of the comparison


@dataclass(frozen=True)
class _Plan:
    """Names of a block's layers, and the op between them."""

    first: tuple[str, ...]
    op: str
    down: str


class FusedFeedForward(nn.Module):
    """A block whose forward is one native call; a base of the classes that `fuse_feed_forward` makes.

    Attributes:
        fused: `Backend.feed_forward`; None: Transformers' own forward is as fast.
    """

    fused: NoCopyCallable | None
    _plan: _Plan

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        x = args[0] if len(args) == 1 and not kwargs else None
        if self.fused is None or not isinstance(x, torch.Tensor) or not self.is_plain(x):
            return super().forward(*args, **kwargs)
        return self.compute(x)

    def compute(self, x: torch.Tensor, **around: Any) -> torch.Tensor:
        """The native call.

        Args:
            around: `norm` and `residual` of `Backend.feed_forward`.
        """
        assert self.fused is not None
        return _compute(self.fused, self, self._plan, x, **around)

    def is_plain(self, x: torch.Tensor) -> bool:
        """Whether the native call computes what Transformers' forward would."""
        if self.training or (torch.is_grad_enabled() and x.requires_grad) or not x.numel():
            return False
        if torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks:
            return False
        layers = (*self._plan.first, self._plan.down)
        children: dict[str, Any] = self._modules
        return all(
            not acts(child)
            and (name not in layers or (type(child) in (GeneralLinear, GeneralConv1D) and child.dtype == x.dtype))
            for name, child in children.items()
        )


def acts(child: Any) -> bool:
    """Whether a part of a module does something that the native call leaves out: hooks, or dropout that is turned on alone."""
    return bool(child._forward_hooks or child._forward_pre_hooks or "forward" in child.__dict__ or child.training)


def _compute(fused: Callable[..., torch.Tensor], block: nn.Module, plan: _Plan, x: torch.Tensor, **around: Any) -> torch.Tensor:
    layers: Any = block._modules
    first, down = [(layers[name].packed, layers[name].bias) for name in plan.first], layers[plan.down]
    return fused(x, first, plan.op, (down.packed, down.bias), **around).to(x.dtype)


def fuse_feed_forward(model: nn.Module, fused: Callable[..., torch.Tensor] | None) -> None:
    """Replaces the classes of the model's feed-forward blocks.

    Args:
        fused: see `FusedFeedForward`.
    """
    if fused is None:
        return
    found: dict[Any, _Plan | None] = {}
    call = NoCopyCallable(fused)
    module: Any
    for module in list(model.modules()):
        if isinstance(module, FusedFeedForward) or not (plans := _plans(module)):
            continue
        if (kind := kind_of(module)) not in found:
            found[kind] = next((plan for plan in plans if _is(module, plan, fused)), None)
        if (plan := found[kind]) is not None:
            module.__class__ = native_class(FusedFeedForward, module)
            module._plan, module.fused = plan, call


def _plans(module: nn.Module) -> Sequence[_Plan]:
    """What the parts of a module may compute together; empty: they are not those of a block."""
    linear: dict[str, Any] = {}
    activations = []
    for name, child in module.named_children():
        if type(child) in (GeneralLinear, GeneralConv1D):
            linear[name] = child
        elif type(child).__name__ in _OPS and not list(child.parameters()):
            activations.append(child)
        elif type(child) not in (nn.Dropout, nn.Identity):
            return ()
    if len(activations) != 1 or len(linear) not in (2, 3) or module._parameters or module._buffers:
        return ()
    op = _OPS[type(activations[0]).__name__][len(linear) - 2]
    if getattr(activations[0], "approximate", "none") != "none":
        op = _TANH[len(linear) - 2]
    if op is None:
        return ()
    plans = []
    for down in linear:
        others = tuple(name for name in linear if name != down)
        shapes = {(linear[name].in_features, linear[name].out_features) for name in others}
        if len(shapes) == 1 and linear[down].in_features == next(iter(shapes))[1]:
            plans += [_Plan(others, op, down)] + ([_Plan(others[::-1], op, down)] if len(others) > 1 else [])
    return plans


def _is(module: Any, plan: _Plan, fused: Callable[..., torch.Tensor]) -> bool:
    """Whether a block computes what the plan says."""
    layer = module._modules[plan.first[0]]
    generator = torch.Generator("cpu").manual_seed(0)
    x = torch.randn(1, ROWS, layer.in_features, generator=generator, device="cpu", dtype=torch.float32).to(layer.dtype)
    training = module.training
    try:
        module.eval()
        with torch.no_grad():
            expected, result = module(x), _compute(fused, module, plan, x)
    except (TypeError, RuntimeError, ValueError):  # other arguments or shapes than a block's
        return False
    finally:
        module.train(training)
    if not isinstance(expected, torch.Tensor) or expected.shape != result.shape or expected.dtype != result.dtype:
        return False
    expected = expected.float()
    moved = (expected - expected.mean(1, keepdim=True)).abs().max()  # without a bias, which tells nothing
    return bool(0 < moved and (expected - result.float()).abs().max() <= ERROR * moved)
