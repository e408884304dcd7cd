"""Steps whose loss or gradients are not finite: left out, or the end of training."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any, Final

import torch

from ..errors import TrainingError
from ..integration.bind.runtime import OptimizerWarning

MAX_SKIPPED: Final = 5  # steps in a row; more are no accident
_LEFT_OUT: Final = "a step was left out, for its loss or gradients are not finite; skipped_steps in the log counts them"


class NonFiniteSteps:
    """What a step came to, and what follows from it.

    Args:
        policy: "stop" or "skip", see `DeepSeekTrainingArguments.on_nan`.
        error: makes the error that ends training, of what was found.

    Attributes:
        bad: whether the step that is being made has a loss or a norm that is not finite: its gradients are to be let go of.
        skipped: steps left out so far.

    Raises, from its methods: what `error` makes.
    """

    def __init__(self, policy: str, error: Callable[[str], TrainingError]) -> None:
        self.bad, self.skipped = False, 0
        self._stops, self._error, self._in_row = policy == "stop", error, 0

    def see_loss(self, loss: torch.Tensor) -> None:
        """Of each pass, before its backward."""
        if torch.isfinite(loss.detach()).all():
            return
        self.bad = True
        if self._stops:
            raise self._error(f"the loss is {float(loss.detach().mean())}")

    def see_norm(self, norm: Any) -> None:
        """Of the gradients, before the optimizer's step."""
        if math.isfinite(float(norm)):
            return
        self.bad = True
        if self._stops:
            raise self._error(f"the norm of the gradients is {float(norm)}")

    def after_step(self, refused: bool) -> None:
        """`refused`: the optimizer found gradients that are not finite, and did nothing."""
        left_out, self.bad = self.bad or refused, False
        self._in_row = self._in_row + 1 if left_out else 0
        if not left_out:
            return
        self.skipped += 1
        if self._stops:
            raise self._error("the gradients are not finite")
        if self._in_row > MAX_SKIPPED:
            raise self._error(f"this is the {self._in_row}th step in a row whose loss or gradients are not finite")
        if self.skipped == 1:
            warnings.warn(_LEFT_OUT, OptimizerWarning, stacklevel=2)
