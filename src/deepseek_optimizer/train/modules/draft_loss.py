"""Training a layer that drafts for a frozen model (`dso draft`): its loss, and how many drafts the model would accept.

The layer is a multi-token prediction layer, whose own state takes the place of the model's from the second draft on, as in
`engine.speculative.mtp`; training does the same for `draft_steps` drafts (Li et al., "EAGLE-3", arXiv 2503.01840, section 3.2;
Zhang et al., "HASS", arXiv 2408.15766). Labels are the model's own most likely tokens instead of the text's, since drafts are
accepted for being those.

With a draft vocabulary, rows whose token is outside of it are not trained, and count as wrong drafts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import torch
import torch.nn.functional as F

from .. import group
from ..repeated_rows import own_rows
from .head_loss import head_loss
from .mtp import head_of, mtp_states
from .mtp_loss import IGNORED, labels_ahead, own_targets
from .stored_states import StoredStates

_CHUNK_BYTES: Final = 64 << 20  # fp32 logits at a time


class DraftObjective:
    """The loss of drafts, which replaces the model's own; the model's weights are frozen.

    Args:
        steps: number of drafts in a row that are trained.
        stored: keeps hidden states for later epochs; None: each epoch computes them.
    """

    def __init__(self, steps: int, stored: StoredStates | None = None) -> None:
        self.steps, self._stored = steps, stored
        self._accepted: list[tuple[float, int]] = []

    def of_text(
        self,
        model: Any,
        run: Callable[[], torch.Tensor],
        input_ids: torch.Tensor,
        labels: torch.Tensor,
        num_items: Any,
        inputs: dict[str, Any],
    ) -> torch.Tensor:
        """The loss of a batch, whose hidden states are those stored in an earlier epoch, or computed.

        Args:
            run: computes the model's last hidden state, [B, S, H], normed.
            model, input_ids, labels, num_items, inputs: as in `__call__`.
        """
        stored = self._stored if model.training else None
        head = model.get_output_embeddings()
        found = None
        if stored is not None:
            found = stored.find(input_ids, labels, inputs, model.config.hidden_size, head.weight.dtype)
        if found is None:
            hidden = run()
            found = hidden, most_likely(hidden, head)
            if stored is not None:
                stored.add(input_ids, labels, inputs, *found)
        hidden, likely = found
        return self(model, hidden, input_ids, labels, num_items, inputs, likely)

    def __call__(
        self,
        model: Any,
        hidden: torch.Tensor,
        input_ids: torch.Tensor,
        labels: torch.Tensor,
        num_items: Any,
        inputs: dict[str, Any],
        likely: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The cross entropy of the model's most likely tokens, averaged over drafts and over the rows that have a label.

        Args:
            model: a model with MTP layers.
            hidden: [B, S, H], the model's last hidden state, normed.
            input_ids: int64 [B, S].
            labels: int64 [B, S], the label of each token itself; -100: drafts for it are not trained.
            num_items: divisor of the sum over rows; None: the number of rows that count.
            inputs: the other keyword arguments that the model was called with.
            likely: int64 [B, S], the model's most likely token after each row; None: computed here.
        """
        positions = inputs.get("position_ids")
        place = positions
        if place is None:
            place = torch.arange(hidden.shape[1], dtype=torch.int64, device=hidden.device)[None]
        likely = most_likely(hidden, model.get_output_embeddings()) if likely is None else likely
        likely = likely.roll(1, 1)  # by the token's own row
        likely = torch.where(labels == IGNORED, IGNORED, likely)
        right = []

        def loss(step: int, depth: int, layer: Any, state: torch.Tensor) -> torch.Tensor:
            wanted = labels_ahead(likely, depth + 2, positions)
            wanted = torch.where(place < step - depth, IGNORED, wanted)  # these rows have no state of the draft before
            wanted = own_targets(layer, wanted, model.config.vocab_size)
            items = float(num_items if num_items is not None else max(1, int((wanted != IGNORED).sum())))
            head = head_of(layer, model)
            if not model.training:
                correct = (most_likely(state, head) == wanted) & (wanted != IGNORED)
                right.append(F.pad(correct, (0, step - depth))[:, step - depth :])  # by the row at which drafting begins
            return head_loss(state.flatten(0, 1), head, wanted.flatten(), IGNORED, items)

        where = (input_ids, inputs.get("attention_mask"), positions)
        losses = [each for *_, each in mtp_states(model, hidden, *where, steps=self.steps, then=loss)]
        if right:
            self._count(right, labels_ahead(likely, 2, positions) != IGNORED)
        return torch.stack(losses).mean()

    def _count(self, right: list[torch.Tensor], rows: torch.Tensor) -> None:
        """Counts the drafts after each of `rows` up to the first wrong one; `right`: for each draft, whether it is correct."""
        own = own_rows(len(rows))
        rows, right = rows[:own], [each[:own] for each in right]
        all_right = torch.stack(right).cumprod(0).bool() & rows
        self._accepted.append((int(all_right.sum()), int(rows.sum())))

    def mean(self, steps: int) -> None:
        """Nothing is logged besides the loss, which is the drafts'."""

    def accepted(self) -> float | None:
        """The mean number of drafts up to the first wrong one, of the rows that all processes have evaluated since the last
        call; None: there are none. On texts that the model wrote itself with the most likely tokens, it is what decoding
        accepts a round."""
        counted, self._accepted = self._accepted, []
        right, rows = group.total(sum(right for right, _ in counted), sum(count for _, count in counted))
        return right / rows if rows else None


@torch.no_grad()
def most_likely(hidden: torch.Tensor, head: Any) -> torch.Tensor:
    """int64 [B, S]: the most likely token after each row of hidden states [B, S, H], computed in chunks of rows."""
    rows = hidden.flatten(0, 1)
    step = max(1, _CHUNK_BYTES // (4 * head.out_features))
    parts = [head(rows[begin : begin + step]).argmax(-1) for begin in range(0, len(rows), step)]
    return torch.cat(parts).view(hidden.shape[:2])
