"""Samples tokens from torch logits for `generate`: greedily or at random, after the logits processors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ..draft import Draft, DraftVocabulary
from .verify import accept_greedy, accept_sampled

# (sequence's index, draft tokens after its own, logits [1, V]) -> processed logits [1, V]
Process = Callable[[int, list[int], torch.Tensor], torch.Tensor]
Float32 = npt.NDArray[np.float32]


class TorchSampler:
    """Samples and verifies tokens. Random numbers come from torch's default generator, as in Transformers.

    Args:
        sampled: sample from the processed distribution; otherwise choose the largest logit.
        process: the request's logits processors; None: logits are not changed.

    Attributes:
        greedy: whether the largest of the model's logits is chosen.
    """

    def __init__(self, *, sampled: bool, process: Process | None = None) -> None:
        self.sampled, self._process = sampled, process
        self.greedy = not sampled and process is None

    def accept(
        self, index: int, draft: Draft, logits: torch.Tensor, used: list[tuple[torch.Tensor, torch.Tensor]] | None = None
    ) -> list[int]:
        """Returns the accepted drafts and one more token chosen by the model.

        Args:
            index: index of the sequence.
            draft: n draft tokens.
            logits: the model's logits, float32 [1 + n, V]; row j is for the token after the first j drafts.
            used: a list to append the (raw, processed) logits, [1, V], of each returned token to.
        """

        def processed(j: int) -> torch.Tensor:
            raw = logits[j : j + 1]
            processed_logits = self._processed(index, draft.tokens[:j], raw)
            if used is not None:
                used.append((raw, processed_logits))
            return processed_logits

        if not self.sampled:
            return accept_greedy(draft.tokens, lambda j: int(largest(processed(j))))
        return accept_sampled(draft.tokens, draft.q, lambda j: _probabilities(processed(j)), _uniform, _drawn)

    def choose(self, index: int, tokens: list[int], logits: torch.Tensor) -> int:
        """Returns the token after some that were chosen already.

        Args:
            index: index of the sequence.
            tokens: the tokens since the sequence's own.
            logits: the model's logits after them, float32 [V].
        """
        processed = self._processed(index, tokens, logits[None])
        return _drawn(_probabilities(processed)) if self.sampled else int(largest(processed))

    def draft(
        self, index: int, drafted: list[int], logits: torch.Tensor, vocabulary: DraftVocabulary | None = None
    ) -> tuple[int, Float32 | None]:
        """Returns a draft token, and the distribution that it was sampled from, float32 [V] (None: it is the largest).

        Args:
            index: index of the sequence.
            drafted: draft tokens before this one.
            logits: the drafting model's logits, float32 [V], or [N] with a draft vocabulary.
            vocabulary: the tokens of the logits; None: all.
        """
        if vocabulary is None:
            processed = self._processed(index, drafted, logits[None])
        elif self._process is None and not self.sampled:
            return int(vocabulary.tokens[int(largest(logits[None]))]), None
        else:
            processed = self._processed(index, drafted, vocabulary.whole(logits)[None])
            if not (processed > -torch.inf).any():  # the processors exclude the whole draft vocabulary: any draft is rejected
                processed = processed.clone()
                processed[:, vocabulary.tokens[0]] = 0
        if not self.sampled:
            return int(largest(processed)), None
        q = _probabilities(processed)
        return _drawn(q), q

    def _processed(self, index: int, drafted: list[int], logits: torch.Tensor) -> torch.Tensor:
        return logits if self._process is None else self._process(index, drafted, logits)


def largest(logits: torch.Tensor) -> torch.Tensor:
    """Returns the index of the largest logit in each row, the first if several are equal: float [B, V] -> int64 [B].

    Uses numpy on the CPU: torch would distribute the work over its own threads, which compete with the plan's threads.
    """
    if logits.device.type != "cpu" or logits.dtype != torch.float32:
        return logits.argmax(-1)
    return torch.from_numpy(logits.detach().numpy().argmax(-1))


def _probabilities(logits: torch.Tensor) -> Float32:
    probabilities: Float32 = logits[0].softmax(-1, dtype=torch.float32).detach().cpu().numpy()
    return probabilities


def _uniform() -> float:
    return float(torch.rand((), dtype=torch.float32, device="cpu"))


def _drawn(weights: npt.NDArray[Any]) -> int:
    """Returns an index sampled in proportion to non-negative weights [V]."""
    return int(torch.multinomial(torch.from_numpy(weights), 1))
