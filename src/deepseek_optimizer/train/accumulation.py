"""Gradients of several passes, added up in fp32: a sum of bf16 gradients in bf16 loses what is small beside it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch


class Accumulators:
    """Gives each weight a `main_grad` of fp32 that the passes of a step add to.

    The ops of this package add to it themselves and leave no gradient behind; what torch's own make is added, and let go of, as
    soon as it is there. The optimizer takes `main_grad` where there is one,
    and empties it.

    Args:
        parameters: those with gradients.
    """

    def __init__(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        self._sums = [(p, torch.zeros_like(p, dtype=torch.float32)) for p in parameters if p.dtype != torch.float32]
        self._handles = [p.register_post_accumulate_grad_hook(_add) for p, _ in self._sums]
        self.give()

    def give(self) -> None:
        """Puts each sum where the passes and the optimizer, which empties it, find it."""
        for parameter, total in self._sums:
            parameter.main_grad = total  # type: ignore[attr-defined]

    def drop(self) -> None:
        """Forgets what was added up, and hides the sums from the optimizer until `give`: without gradients it does nothing."""
        for parameter, total in self._sums:
            parameter.main_grad = None  # type: ignore[attr-defined]
            total.zero_()

    def remove(self) -> None:
        """Takes all of it away again."""
        for handle in self._handles:
            handle.remove()
        for parameter, _ in self._sums:
            del parameter.main_grad  # type: ignore[attr-defined]
        self._sums, self._handles = [], []


def _add(parameter: Any) -> None:
    if parameter.grad is not None:
        parameter.main_grad.add_(parameter.grad)
        parameter.grad = None
