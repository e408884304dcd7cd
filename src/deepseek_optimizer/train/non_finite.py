"""Handling of steps whose loss or gradients are not finite: they are skipped, or training stops."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any, Final

import torch

from ..errors import TrainingError
from ..integration.bind.runtime import OptimizerWarning

MAX_SKIPPED: Final = 5  # consecutive steps
_SKIPPED: Final = "a training step was skipped: its loss or gradients are not finite; skipped_steps in the log counts them"


class NonFiniteSteps:
    """Applies the policy for losses and gradients that are not finite. Its methods raise what `error` returns.

    Args:
        policy: "stop" or "skip"; see `DeepSeekTrainingArguments.on_nan`.
        error: builds the error that ends training from a description of the cause.

    Attributes:
        bad: whether the current step has a loss or gradient norm that is not finite; its gradients must be discarded.
        skipped: number of steps skipped so far.
    """

    def __init__(self, policy: str, error: Callable[[str], TrainingError]) -> None:
        self.bad, self.skipped = False, 0
        self._stops, self._error, self._in_row = policy == "stop", error, 0

    def check_loss(self, loss: torch.Tensor) -> None:
        """Checks the loss of a pass, before its backward pass."""
        if torch.isfinite(loss.detach()).all():
            return
        self.bad = True
        if self._stops:
            raise self._error(f"the loss is {float(loss.detach().mean())}")

    def check_norm(self, norm: Any) -> None:
        """Checks the norm of the gradients, before the optimizer's step."""
        if math.isfinite(float(norm)):
            return
        self.bad = True
        if self._stops:
            raise self._error(f"the norm of the gradients is {float(norm)}")

    def after_step(self, refused: bool) -> None:
        """Counts a skipped step, and decides whether training stops.

        Args:
            refused: the optimizer skipped the step because gradients are not finite.
        """
        skipped, self.bad = self.bad or refused, False
        self._in_row = self._in_row + 1 if skipped else 0
        if not skipped:
            return
        self.skipped += 1
        if self._stops:
            raise self._error("the gradients are not finite")
        if self._in_row > MAX_SKIPPED:
            raise self._error(f"this is the {self._in_row}th step in a row whose loss or gradients are not finite")
        if self.skipped == 1:
            warnings.warn(_SKIPPED, OptimizerWarning, stacklevel=2)
