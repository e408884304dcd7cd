"""Distillation: a model is trained to give the same next-token distributions as a teacher (Hinton et al., arXiv 1503.02531)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .. import group
from ..ops.divergence import linear_divergence
from ..repeated_rows import own_rows
from .mtp_loss import IGNORED


class Distillation:
    """The loss weight * KL(teacher || student) + (1 - weight) * cross entropy.

    The divergence is the mean over all tokens of the batch, also those without a label, except padding.

    Args:
        teacher: a model whose decoder is `model` and whose head is the plain linear layer `lm_head`.
        weight: from 0 to 1.
        padding: the token that a collator fills rows with; None: only an attention mask marks padding.
    """

    def __init__(self, teacher: Any, weight: float, padding: int | None = None) -> None:
        self.teacher, self.weight, self._padding = teacher, weight, padding
        self._sum, self._tokens = 0.0, 0

    def __call__(
        self,
        student: Any,
        hidden: torch.Tensor,
        labels: torch.Tensor,
        inputs: dict[str, Any],
        cross_entropy: Callable[[], torch.Tensor],
    ) -> torch.Tensor:
        """The loss, as an fp32 scalar.

        Args:
            student: the model that is trained.
            hidden: [B, S, H], its last hidden states.
            labels: int64 [B, S], the label of each token itself; only used to find padding.
            inputs: the keyword arguments that its decoder was called with, among them `input_ids` int64 [B, S].
            cross_entropy: returns the loss without a teacher.
        """
        with torch.no_grad():
            wanted = self.teacher.model(**{**inputs, "use_cache": False, "return_dict": True}).last_hidden_state
        rows = self._counted(inputs["input_ids"], labels, inputs.get("attention_mask"))
        evaluates, own = not torch.is_grad_enabled(), len(rows)
        if evaluates and (own := own_rows(own)):
            rows = torch.cat([rows[:own], torch.zeros_like(rows[own:])])
        loss = linear_divergence(hidden[rows], student.lm_head.weight, wanted[rows], self.teacher.lm_head.weight)
        if evaluates and own:
            count = int(rows.sum())
            self._sum, self._tokens = self._sum + float(loss) * count, self._tokens + count
        return loss if self.weight == 1 else self.weight * loss + (1 - self.weight) * cross_entropy()

    def mean(self) -> float | None:
        """The mean divergence of the tokens that all processes have evaluated since the last call; None if there were none."""
        divergence, tokens = group.total(self._sum, self._tokens)
        self._sum, self._tokens = 0.0, 0
        return divergence / tokens if tokens else None

    def _counted(self, ids: torch.Tensor, labels: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """bool [B, S]: the tokens that are not padding. Packed rows have no mask: their padding is the padding tokens at the
        end of a row that have no label."""
        if mask is not None and mask.dim() == 2:
            return mask.bool()
        if self._padding is None:
            return torch.ones_like(ids, dtype=torch.bool)
        text = (ids != self._padding) | (labels != IGNORED)
        return text.int().flip(-1).cummax(-1).values.flip(-1).bool()
