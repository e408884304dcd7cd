"""The loss of multi-token prediction (MTP): the cross entropy of the token that each MTP layer predicts, averaged over layers
(DeepSeek-V3 report, section 2.2). V3 used a weight of 0.3 for the first two thirds of its tokens, then 0.1."""

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
    """The loss of a model's MTP layers, as an fp32 scalar; 0 if no text is long enough to have a label.

    Args:
        model: a model with MTP layers (see `modules.mtp.add_trained_layers`).
        hidden: [B, S, H], the model's last hidden state, normed, or its streams, as in `mtp.mtp_states`; differentiable.
        input_ids: int64 [B, S].
        labels: int64 [B, S], the label of each token itself (not of the next one); -100: ignored.
        attention_mask, position_ids: as passed to the model.
        num_items: divisor of the sum over tokens, as for the model's own loss; None: the number of labels that count.
    """

    def loss(_: int, depth: int, layer: Any, state: torch.Tensor) -> torch.Tensor:
        targets = own_targets(layer, labels_ahead(labels, depth + 2, position_ids), model.config.vocab_size)
        items = float(num_items if num_items is not None else max(1, int((targets != IGNORED).sum())))
        return head_loss(state.flatten(0, 1), head_of(layer, model), targets.flatten(), IGNORED, items)

    losses = [each for *_, each in mtp_states(model, hidden, input_ids, attention_mask, position_ids, then=loss)]
    return torch.stack(losses).mean()


class MtpObjective:
    """The weighted MTP loss, and its mean for logging.

    Args:
        weight: the factor lambda of the report; may be changed during training.
    """

    def __init__(self, weight: float) -> None:
        self.weight = weight
        self._losses: list[torch.Tensor] = []

    def __call__(
        self,
        model: Any,
        hidden: torch.Tensor,
        input_ids: torch.Tensor,
        labels: torch.Tensor,
        num_items: Any,
        inputs: dict[str, Any],
    ) -> torch.Tensor:
        """weight * mtp_loss(...).

        Args:
            inputs: the other keyword arguments that the model was called with.
        """
        where = {name: inputs.get(name) for name in ("attention_mask", "position_ids")}
        loss = mtp_loss(model, hidden, input_ids, labels, num_items=num_items, **where)
        self._losses.append(loss.detach())
        return self.weight * loss

    def mean(self, steps: int) -> float | None:
        """The mean unweighted loss per step since the last call; None if there was no step.

        The losses of the passes of a step add up to the step's loss, since Trainer divides them.

        Args:
            steps: number of steps since the last call.
        """
        losses, self._losses = self._losses, []
        return float(torch.stack(losses).sum()) / steps if losses and steps else None


def labels_ahead(labels: torch.Tensor, ahead: int, position_ids: torch.Tensor | None = None) -> torch.Tensor:
    """int64 [B, S]: row i has the label of token i + ahead, or -100 if that is not in the same text.

    Args:
        labels: int64 [B, S], the label of each token itself.
        ahead: distance in tokens.
        position_ids: int64 [B, S] or [1, S]; a text ends where they are not consecutive.
    """
    out = torch.full_like(labels, IGNORED)
    if ahead >= labels.shape[1]:
        return out
    out[:, :-ahead] = labels[:, ahead:]
    if position_ids is not None:
        consecutive = position_ids[:, ahead:] == position_ids[:, :-ahead] + ahead
        out[:, :-ahead].masked_fill_(~consecutive, IGNORED)
    return out


def own_targets(layer: Any, tokens: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """Tokens as indices of an MTP layer's logits: themselves or, with a draft vocabulary, their places in it.

    Args:
        layer: the layer.
        tokens: int64, IGNORED where there is none.
        vocab_size: number of tokens of the model.

    Returns: int64 of the same shape; IGNORED also for tokens outside of the draft vocabulary.
    """
    vocabulary = getattr(layer.shared_head, "tokens", None)
    if vocabulary is None:
        return tokens
    places = torch.full((vocab_size,), IGNORED, dtype=torch.int64, device=tokens.device)
    places[vocabulary] = torch.arange(len(vocabulary), device=tokens.device, dtype=torch.int64)
    return torch.where(tokens == IGNORED, IGNORED, places[tokens.clamp(min=0)])
