"""Gradient accumulation in fp32: a bf16 sum would round small gradients away."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch


class Accumulators:
    """Gives each weight that is not fp32 an fp32 `main_grad`, which accumulates its gradients over the passes of a step.

    The ops of this package add to `main_grad` directly and return no gradient. Gradients of torch's own ops are added by a hook
    and freed immediately. The optimizer uses `main_grad` where it exists, and zeroes it after the step.

    Args:
        parameters: the trainable parameters.
    """

    def __init__(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        self._sums = [(p, torch.zeros_like(p, dtype=torch.float32)) for p in parameters if p.dtype != torch.float32]
        self._handles = [p.register_post_accumulate_grad_hook(_add) for p, _ in self._sums]
        self.attach()

    def attach(self) -> None:
        """Sets each parameter's `main_grad`, for the passes that add to it and for the optimizer."""
        for parameter, total in self._sums:
            parameter.main_grad = total  # type: ignore[attr-defined]

    def drop(self) -> None:
        """Zeroes the sums and hides them from the optimizer until `attach`, so that its next step changes nothing."""
        for parameter, total in self._sums:
            parameter.main_grad = None  # type: ignore[attr-defined]
            total.zero_()

    def remove(self) -> None:
        """Removes the hooks and the `main_grad` attributes."""
        for handle in self._handles:
            handle.remove()
        for parameter, _ in self._sums:
            del parameter.main_grad  # type: ignore[attr-defined]
        self._sums, self._handles = [], []


def _add(parameter: Any) -> None:
    if parameter.grad is not None:
        parameter.main_grad.add_(parameter.grad)
        parameter.grad = None
