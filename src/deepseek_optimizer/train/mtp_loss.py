"""The loss of multi-token prediction: the mean over MTP layers of the cross entropy of the token that each of them predicts
(DeepSeek-V3's report, section 2.2). V3 added it with a weight of 0.3 for the first two thirds of its tokens, then 0.1."""

from __future__ import annotations

from typing import Any

import torch

from .modules.mtp import head_of, mtp_states
from .modules.plain_ops import linear_cross_entropy

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
    """fp32 scalar. Logits never stand as a whole.

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
        weight = head_of(layer, model).weight
        losses.append(linear_cross_entropy(state.flatten(0, 1), weight, wanted.flatten(), num_items=num_items))
    return torch.stack(losses).mean()


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
