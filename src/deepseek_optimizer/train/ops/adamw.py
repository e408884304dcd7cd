"""AdamW (Loshchilov and Hutter, "Decoupled Weight Decay Regularization", 2019) for many tensors, in one pass over each, and the
squared norms of their gradients.

The torch and the native implementation do the same operations in the same order, and their results are bitwise equal.
"""

from __future__ import annotations

import ctypes as C
from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass
from typing import Final, Literal

import torch

from ...backends.cpu.buffers import address, optional
from ...backends.cpu.native_train import TrainNumbers, TrainUpdate
from . import native, triton_ops
from .moments import BLOCK, Moments, root
from .random_bits import random_bits, stochastic_round

Master = Literal["none", "split", "stochastic"]
_MASTERS: Final = {"none": 0, "split": 1, "stochastic": 2}  # DSO_MASTER_*
_MOMENTS: Final = {"fp32": 0, "bf16": 1, "int8": 2}  # DSO_MOMENTS_*


@dataclass(frozen=True)
class Rates:
    """The coefficients of a step, each rounded to fp32 once: g = gradient_scale gradient, m = beta1 m + rest1 g,
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
        """The coefficients of step number `step`, counted from 1."""
        beta1, beta2 = betas
        bias2 = (1 - beta2**step) ** -0.5
        return cls(gradient_scale, beta1, 1 - beta1, beta2, 1 - beta2, bias2, eps, lr / (1 - beta1**step), lr * weight_decay)


@dataclass
class Update:
    """The update of one tensor in a step. All tensors except the gradient are changed in place.

    Args:
        parameter: fp32 (master "none") or bf16.
        gradient: fp32 or bf16, of the parameter's shape.
        moments: moments after the previous step.
        rates: coefficients of this step.
        master: "none": the parameter is fp32; "split": `low` holds the low bits of the fp32 master weight; "stochastic": there
            is no master weight, and the parameter is rounded stochastically.
        low: int16, of the parameter's shape, for "split"; see `join`.
        key: key of the random bits; see `random_bits.keys`.
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
    """The fp32 weights whose upper half is the bf16 `upper`; `low` (int16) is added to the bits of `upper` as fp32."""
    return (upper.float().view(torch.int32) + low.to(torch.int32)).view(torch.float32)


def split(weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Splits fp32 weights into the nearest bf16 weights (ties away from zero) and the int16 remainders that `join` adds."""
    bits = torch.where(weights.isnan(), torch.nan, weights).view(torch.int32)
    upper = ((bits.to(torch.int64) + 0x8000) & 0xFFFF0000).to(torch.int32)
    return upper.view(torch.float32).to(torch.bfloat16), (bits - upper).to(torch.int16)


def adamw(updates: Sequence[Update]) -> None:
    """Performs the updates. Raises BackendError."""
    native_updates = [u for u in updates if _native(u.parameter, u.gradient) and all(t.is_contiguous() for t in u.tensors())]
    if native_updates:
        descriptors = (TrainUpdate * len(native_updates))(*map(_descriptor, native_updates))
        native.call("dso_train_adamw", descriptors, len(native_updates))
        for update in native_updates:  # so that a later backward through the old weights raises, as with torch's own ops
            torch.autograd.graph.increment_version(update.parameter)
    done = set(map(id, native_updates))
    for update in updates:
        if id(update) in done:
            continue
        dense = all(t.is_contiguous() for t in update.tensors())
        if dense and triton_ops.usable(update.parameter, update.gradient):
            u = update
            triton_ops.adamw(u.parameter, u.low, u.gradient, u.moments, astuple(u.rates), u.key, u.master)
        else:
            adamw_reference(update)


def adamw_reference(update: Update) -> None:
    """One update in plain torch, for any device."""
    u, rates = update, update.rates
    weights = u.parameter.detach()
    if u.low is not None:
        weights = join(weights, u.low)
    w, g = weights.reshape(-1).float(), u.gradient.detach().reshape(-1).float() * rates.gradient_scale
    m, v = u.moments.read()
    m, v = m * rates.beta1 + g * rates.rest1, v * rates.beta2 + g * rates.rest2 * g
    change = w * rates.decay + m * rates.step / (root(v) * rates.bias2 + rates.eps)
    u.moments.write(m, v, u.key)
    weights = (w - change).view(weights.shape)
    if u.low is not None:
        weights, low = split(weights)
        u.low.copy_(low)
    elif u.master == "stochastic":
        random = random_bits(weights.numel(), *u.key[2:], weights.device) & 0xFFFF
        weights = stochastic_round(weights, random.view_as(weights))
    with torch.no_grad():
        u.parameter.copy_(weights)


def squares(tensors: Sequence[torch.Tensor]) -> tuple[list[float], list[int]]:
    """For each tensor, the sum of its squares and the number of its elements that are not finite.

    Sums are in double precision, in an order that does not depend on the number of threads. Raises BackendError.
    """
    sums, not_finite = [0.0] * len(tensors), [0] * len(tensors)
    indices = [i for i, t in enumerate(tensors) if _native(t)]
    if indices:
        dense = [tensors[i].contiguous() for i in indices]
        numbers = (TrainNumbers * len(dense))(*(native.numbers(t, "a gradient") for t in dense))
        totals, counts = (C.c_double * len(dense))(), (C.c_int64 * len(dense))()
        native.call("dso_train_squares", numbers, len(dense), totals, counts)
        for i, total, count in zip(indices, totals, counts, strict=True):
            sums[i], not_finite[i] = total, count
    on_card = [i for i, t in enumerate(tensors) if triton_ops.usable(t)]
    if on_card:
        for i, total, count in zip(on_card, *triton_ops.squares([tensors[i] for i in on_card]), strict=True):
            sums[i], not_finite[i] = total, count
    for i in set(range(len(tensors))).difference(indices, on_card):
        sums[i], not_finite[i] = squares_reference(tensors[i])
    return sums, not_finite


def squares_reference(tensor: torch.Tensor) -> tuple[float, int]:
    """`squares` of one tensor in plain torch."""
    return float(tensor.double().square().sum()), int((~tensor.isfinite()).sum())


def _native(*tensors: torch.Tensor) -> bool:
    return native.usable(*tensors)


def _descriptor(update: Update) -> TrainUpdate:
    u, r, moments, shape = update, update.rates, update.moments, update.parameter.shape
    scales = (-(-u.parameter.numel() // BLOCK),)
    pointers = (
        address(u.parameter, "parameter", u.parameter.dtype, shape), optional(u.low, "low", torch.int16, shape),
        address(u.gradient, "gradient", u.gradient.dtype, shape), address(moments.m, "m", moments.m.dtype, shape),
        address(moments.v, "v", torch.uint8 if moments.kind == "int8" else moments.m.dtype, shape),
        optional(moments.m_scale, "m_scale", torch.float32, scales),
        optional(moments.v_scale, "v_scale", torch.float32, scales),
    )  # fmt: skip
    numbers = (r.gradient_scale, r.beta1, r.rest1, r.beta2, r.rest2, r.bias2, r.eps, r.step, r.decay)
    return TrainUpdate(
        *pointers, u.parameter.numel(), _MASTERS[u.master], _MOMENTS[moments.kind], native.type_of(u.gradient), *numbers,
        (C.c_uint32 * 4)(*u.key),
    )  # fmt: skip
