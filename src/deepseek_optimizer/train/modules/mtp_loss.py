"""The loss of multi-token prediction: the mean over MTP layers of the cross entropy of the token that each of them predicts
(DeepSeek-V3's report, section 2.2). V3 added it with a weight of 0.3 for the first two thirds of its tokens, then 0.1."""

from __future__ import annotations

from typing import Any

import torch

from .head_loss import head_loss
from .mtp import head_of, mtp_states

IGNORED = -100


def mtp_loss(
    model: Any,
    hidden: torch.Tensor,
    input_ids: torch.Tensor,
    labels: torch.Tensor,
    *,
    attention_mask: torch.Tensor | None = None,
    position_ids: torch.Tensor | None = None,
    num_items: torch.Tensor | int | None = None,
) -> torch.Tensor:
    """fp32 scalar; 0 where no text is long enough to have a label.

    Args:
        model: has MTP layers (`modules.mtp.add_trained_layers`).
        hidden: [B, S, H], the model's last hidden state, normed; differentiable.
        input_ids: int64 [B, S].
        labels: int64 [B, S], of each token itself (not of the next), -100 where it does not count.
        attention_mask, position_ids: as the model itself was given them.
        num_items: what the sum over tokens is divided by, as for the model's own loss; None: by how many labels count.
    """
    losses = []
    states = mtp_states(model, hidden, input_ids, attention_mask, position_ids)
    for depth, (layer, state) in enumerate(states):
        wanted = labels_ahead(labels, depth + 2, position_ids)
        items = float(num_items if num_items is not None else max(1, int((wanted != IGNORED).sum())))
        losses.append(head_loss(state.flatten(0, 1), head_of(layer, model), wanted.flatten(), IGNORED, items))
    return torch.stack(losses).mean()


class MtpObjective:
    """What multi-token prediction adds to a model's loss, and how large it was.

    Args:
        weight: lambda of the report; may be changed as training goes on.
    """

    def __init__(self, weight: float) -> None:
        self.weight = weight
        self._seen: list[torch.Tensor] = []

    def __call__(
        self,
        model: Any,
        hidden: torch.Tensor,
        input_ids: torch.Tensor,
        labels: torch.Tensor,
        num_items: Any,
        inputs: dict[str, Any],
    ) -> torch.Tensor:
        """weight * `mtp_loss`. inputs: what else the model was called with."""
        where = {name: inputs.get(name) for name in ("attention_mask", "position_ids")}
        loss = mtp_loss(model, hidden, input_ids, labels, num_items=num_items, **where)
        self._seen.append(loss.detach())
        return self.weight * loss

    def mean(self, steps: int) -> float | None:
        """The loss of a step without its weight, over the `steps` since the last call; None if there was none.

        Each pass of a step has its share of the step's loss, as Trainer divides it."""
        seen, self._seen = self._seen, []
        return float(torch.stack(seen).sum()) / steps if seen and steps else None


def labels_ahead(labels: torch.Tensor, ahead: int, position_ids: torch.Tensor | None = None) -> torch.Tensor:
    """int64 [B, S]: at row i the label of token i + ahead, or -100 where there is none in the same text.

    Args:
        labels: int64 [B, S], of each token itself.
        position_ids: int64 [B, S] or [1, S]; a text ends where they do not go on.
    """
    out = torch.full_like(labels, IGNORED)
    if ahead >= labels.shape[1]:
        return out
    out[:, :-ahead] = labels[:, ahead:]
    if position_ids is not None:
        goes_on = position_ids[:, ahead:] == position_ids[:, :-ahead] + ahead
        out[:, :-ahead].masked_fill_(~goes_on, IGNORED)
    return out
