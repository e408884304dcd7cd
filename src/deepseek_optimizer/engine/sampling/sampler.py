"""From logits to tokens, for one request: greedy or sampled, through the request's logits processors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ..draft import Draft
from .verify import accept_greedy, accept_sampled

# (sequence's index, tokens drafted behind its own, logits [1, V]) -> processed logits [1, V]
Process = Callable[[int, list[int], torch.Tensor], torch.Tensor]
Float32 = npt.NDArray[np.float32]


class Sampler:
    """Random numbers come from torch's default generator, as Transformers' do.

    Args:
        sampled: drawn from the processed distribution; else its largest.
        process: what the request does to logits; None: nothing.
    """

    def __init__(self, *, sampled: bool, process: Process | None = None) -> None:
        self.sampled, self._process = sampled, process

    def accept(
        self, index: int, draft: Draft, logits: torch.Tensor, used: list[tuple[torch.Tensor, torch.Tensor]] | None = None
    ) -> list[int]:
        """The drafts that hold, then one more token of the model's own.

        Args:
            logits: float32 [1 + n, V]: row j follows the first j drafts.
            used: where to put (raw, processed) logits [1, V] of each token returned.
        """

        def processed(j: int) -> torch.Tensor:
            raw = logits[j : j + 1]
            found = self._processed(index, draft.tokens[:j], raw)
            if used is not None:
                used.append((raw, found))
            return found

        if not self.sampled:
            return accept_greedy(draft.tokens, lambda j: int(largest(processed(j))))
        return accept_sampled(draft.tokens, draft.q, lambda j: _probabilities(processed(j)), _uniform, _drawn)

    def draft(self, index: int, drafted: list[int], logits: torch.Tensor) -> tuple[int, Float32 | None]:
        """A token for the place behind `drafted`, and the distribution [V] it was drawn from (None: the largest, for certain).

        Args:
            logits: float32 [V], of the drafting model.
        """
        processed = self._processed(index, drafted, logits[None])
        if not self.sampled:
            return int(largest(processed)), None
        q = _probabilities(processed)
        return _drawn(q), q

    def _processed(self, index: int, drafted: list[int], logits: torch.Tensor) -> torch.Tensor:
        return logits if self._process is None else self._process(index, drafted, logits)


def largest(logits: torch.Tensor) -> torch.Tensor:
    """Index of each row's largest logit, the first of equals: float [B, V] -> int64 [B].

    By numpy on the CPU: torch shares a vocabulary among its own threads, which then wait for the cores that the plan's hold.
    """
    if logits.device.type != "cpu" or logits.dtype != torch.float32:
        return logits.argmax(-1)
    return torch.from_numpy(logits.detach().numpy().argmax(-1))


def _probabilities(logits: torch.Tensor) -> Float32:
    found: Float32 = logits[0].softmax(-1, dtype=torch.float32).detach().cpu().numpy()
    return found


def _uniform() -> float:
    return float(torch.rand((), dtype=torch.float32, device="cpu"))


def _drawn(weights: npt.NDArray[Any]) -> int:
    """An index, drawn in proportion to non-negative weights [V]."""
    return int(torch.multinomial(torch.from_numpy(weights), 1))
