"""AdamW (Loshchilov and Hutter, "Decoupled Weight Decay Regularization", 2019) of many tensors in one pass over each, and the
squares of their gradients.

Both forms, the plain one in torch and the native one, do the same operations in the same order and give the same bits.
"""

from __future__ import annotations

import ctypes as C
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final, Literal

import torch

from ...backends.cpu.buffers import address, optional
from ...backends.cpu.native_train import TrainNumbers, TrainUpdate
from . import native
from .moments import BLOCK, Moments, root
from .random_bits import random_bits, round_by_chance

Master = Literal["none", "split", "stochastic"]
_MASTERS: Final = {"none": 0, "split": 1, "stochastic": 2}  # DSO_MASTER_*
_MOMENTS: Final = {"fp32": 0, "bf16": 1, "int8": 2}  # DSO_MOMENTS_*


@dataclass(frozen=True)
class Rates:
    """The numbers of a step, each rounded to fp32 once: g = gradient_scale gradient, m = beta1 m + rest1 g,
    v = beta2 v + rest2 g^2, w = w - (decay w + step m / (bias2 sqrt(v) + eps))."""

    gradient_scale: float
    beta1: float
    rest1: float
    beta2: float
    rest2: float
    bias2: float
    eps: float
    step: float
    decay: float

    @classmethod
    def at(
        cls, step: int, *, lr: float, betas: tuple[float, float], eps: float, weight_decay: float, gradient_scale: float = 1.0
    ) -> Rates:
        """Those of step number `step`, counted from 1."""
        beta1, beta2 = betas
        bias2 = (1 - beta2**step) ** -0.5
        return cls(gradient_scale, beta1, 1 - beta1, beta2, 1 - beta2, bias2, eps, lr / (1 - beta1**step), lr * weight_decay)


@dataclass
class Update:
    """A step of one tensor. All tensors are changed in place but the gradient.

    Args:
        parameter: fp32 (master "none") or bf16.
        gradient: fp32 or bf16, of the parameter's shape.
        moments: as the last step left them.
        rates: of this step.
        master: "none": the parameter is fp32 itself; "split": `low` holds what it lacks of an fp32 weight; "stochastic":
            nothing does, and the parameter is rounded up or down by chance.
        low: int16, of the parameter's shape, for "split": see `join`.
        key: of the random bits, see `random_bits.keys`.
    """

    parameter: torch.Tensor
    gradient: torch.Tensor
    moments: Moments
    rates: Rates
    master: Master = "none"
    low: torch.Tensor | None = None
    key: tuple[int, int, int, int] = (0, 0, 0, 0)

    def tensors(self) -> Iterable[torch.Tensor]:
        moments = self.moments
        optional = (self.low, moments.m_scale, moments.v_scale)
        return self.parameter, self.gradient, moments.m, moments.v, *(t for t in optional if t is not None)


def join(upper: torch.Tensor, low: torch.Tensor) -> torch.Tensor:
    """The fp32 weights of bf16 ones and the int16 numbers that their bits must be increased by."""
    return (upper.float().view(torch.int32) + low.to(torch.int32)).view(torch.float32)


def split(weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """fp32 weights as the nearest bf16 ones (of two, those farther from zero) and int16 numbers: what `join` takes."""
    bits = torch.where(weights.isnan(), torch.nan, weights).view(torch.int32)
    upper = ((bits.to(torch.int64) + 0x8000) & 0xFFFF0000).to(torch.int32)
    return upper.view(torch.float32).to(torch.bfloat16), (bits - upper).to(torch.int16)


def adamw(updates: Sequence[Update]) -> None:
    """A step of each of these tensors. Raises BackendError."""
    native_ones = [u for u in updates if _native(u.parameter, u.gradient) and all(t.is_contiguous() for t in u.tensors())]
    if native_ones:
        described = (TrainUpdate * len(native_ones))(*map(_described, native_ones))
        native.call("dso_train_adamw", described, len(native_ones))
        for update in native_ones:  # so that a backward through the weights as they were is an error, as of torch's own
            torch.autograd.graph.increment_version(update.parameter)
    taken = set(map(id, native_ones))
    for update in updates:
        if id(update) not in taken:
            adamw_reference(update)


def adamw_reference(update: Update) -> None:
    """The same in plain torch, for any device."""
    u, rates = update, update.rates
    weights = u.parameter.detach()
    if u.low is not None:
        weights = join(weights, u.low)
    w, g = weights.reshape(-1).float(), u.gradient.detach().reshape(-1).float() * rates.gradient_scale
    m, v = u.moments.read()
    m, v = m * rates.beta1 + g * rates.rest1, v * rates.beta2 + g * rates.rest2 * g
    change = w * rates.decay + m * rates.step / (root(v) * rates.bias2 + rates.eps)
    u.moments.write(m, v, u.key)
    made = (w - change).view(weights.shape)
    if u.low is not None:
        made, low = split(made)
        u.low.copy_(low)
    elif u.master == "stochastic":
        made = round_by_chance(made, (random_bits(made.numel(), *u.key[2:], made.device) & 0xFFFF).view_as(made))
    with torch.no_grad():
        u.parameter.copy_(made)


def squares(tensors: Sequence[torch.Tensor]) -> tuple[list[float], list[int]]:
    """Of each tensor the sum of its squares, in double and in an order that doesn't depend on threads, and how many of its
    numbers are not finite. Raises BackendError."""
    sums, not_finite = [0.0] * len(tensors), [0] * len(tensors)
    places = [i for i, t in enumerate(tensors) if _native(t)]
    if places:
        dense = [tensors[i].contiguous() for i in places]
        numbers = (TrainNumbers * len(dense))(*(native.numbers(t, "a gradient") for t in dense))
        found, odd = (C.c_double * len(dense))(), (C.c_int64 * len(dense))()
        native.call("dso_train_squares", numbers, len(dense), found, odd)
        for i, total, count in zip(places, found, odd, strict=True):
            sums[i], not_finite[i] = total, count
    for i in set(range(len(tensors))).difference(places):
        sums[i], not_finite[i] = squares_reference(tensors[i])
    return sums, not_finite


def squares_reference(tensor: torch.Tensor) -> tuple[float, int]:
    """`squares` of one tensor in plain torch."""
    return float(tensor.double().square().sum()), int((~tensor.isfinite()).sum())


def _native(*tensors: torch.Tensor) -> bool:
    return native.usable(*tensors)


def _described(update: Update) -> TrainUpdate:
    u, r, moments, shape = update, update.rates, update.moments, update.parameter.shape
    scales = (-(-u.parameter.numel() // BLOCK),)
    places = (
        address(u.parameter, "parameter", u.parameter.dtype, shape), optional(u.low, "low", torch.int16, shape),
        address(u.gradient, "gradient", u.gradient.dtype, shape), address(moments.m, "m", moments.m.dtype, shape),
        address(moments.v, "v", torch.uint8 if moments.kind == "int8" else moments.m.dtype, shape),
        optional(moments.m_scale, "m_scale", torch.float32, scales),
        optional(moments.v_scale, "v_scale", torch.float32, scales),
    )  # fmt: skip
    numbers = (r.gradient_scale, r.beta1, r.rest1, r.beta2, r.rest2, r.bias2, r.eps, r.step, r.decay)
    return TrainUpdate(
        *places, u.parameter.numel(), _MASTERS[u.master], _MOMENTS[moments.kind], native.type_of(u.gradient), *numbers,
        (C.c_uint32 * 4)(*u.key),
    )  # fmt: skip
