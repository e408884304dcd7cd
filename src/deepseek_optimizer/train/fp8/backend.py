"""The backend of FP8 training: tensor cores, or emulation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch

from ...errors import BackendError
from ..ops.product import Form, product
from . import hardware
from .quantize import BLOCK, COLUMN, E4M3, E5M2, ROW, round_trip

Fp8Backend = Literal["auto", "hardware", "emulate"]


@dataclass(frozen=True)
class Fp8Products:
    """The three products of a linear layer in FP8.

    Attributes:
        gradients: format of gradients, E4M3 or E5M2. Activations and weights are E4M3.
        on_hardware: use tensor cores; False: emulate them.
        note: a sentence about the backend, for the user.
    """

    gradients: torch.dtype = E4M3
    on_hardware: bool = False
    note: str = ""

    def forward(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """x [T, K] (1 x 128), weight [N, K] (128 x 128) -> x weight^T + bias [T, N]."""
        if self.on_hardware:
            y = hardware.multiply(x, weight, E4M3, E4M3, b_blocks=True).to(x.dtype)
            return y if bias is None else y + bias
        return product("nt", round_trip(x, ROW), round_trip(weight, BLOCK), bias=bias)

    def input_gradient(self, dy: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """dy [T, N] (1 x 128), weight [N, K] (128 x 128) -> dy weight [T, K]. The weight has the same codes as in `forward`."""
        if self.on_hardware:
            return hardware.multiply(dy, weight.t(), self.gradients, E4M3, b_blocks=True).to(dy.dtype)
        return product("nn", round_trip(dy, ROW, self.gradients), round_trip(weight, BLOCK))

    def weight_gradient(
        self, dy: torch.Tensor, x: torch.Tensor, out: torch.Tensor | None = None, add: bool = False
    ) -> torch.Tensor:
        """dy [T, N] and x [T, K], both 128 x 1 along T -> dy^T x [N, K], of dy's dtype.

        Args:
            out: the tensor to write the result to; None: a new one.
            add: add to `out` instead of overwriting it.
        """
        if not self.on_hardware:
            form: Form = "tn"
            return product(form, round_trip(dy, COLUMN, self.gradients), round_trip(x, COLUMN), out=out, add=add)
        result = hardware.multiply(dy.t(), x.t(), self.gradients, E4M3, b_blocks=False)
        if out is None:
            return result.to(dy.dtype)
        return out.add_(result) if add else out.copy_(result)


def choose(backend: Fp8Backend, device: torch.device, e4m3: bool = True) -> Fp8Products:
    """Chooses the backend for a device.

    Args:
        backend: "hardware", "emulate", or "auto": hardware if it is available.
        e4m3: gradients in E4M3; False: E5M2.

    Raises:
        BackendError: "hardware" is not available; the message says what it requires.
    """
    gradients = E4M3 if e4m3 else E5M2
    reason = None if backend == "emulate" else hardware.why_not(device)
    if backend == "hardware" and reason is not None:
        raise BackendError(f'fp8_backend="hardware" is not available: {reason}; fp8_backend="emulate" has the same numerics')
    if backend != "emulate" and reason is None:
        return Fp8Products(gradients, True, "FP8 products run on tensor cores")
    why = 'fp8_backend="emulate"' if backend == "emulate" else reason
    return Fp8Products(gradients, False, f"FP8 is emulated: the same numerics, but slower than bf16 ({why})")


def from_arguments(args: Any) -> Fp8Products | None:
    """The backend that `DeepSeekTrainingArguments` select; None without `fp8_enabled`. Raises BackendError."""
    return choose(args.fp8_backend, args.device, args.fp8_e4m3) if args.fp8_enabled else None
