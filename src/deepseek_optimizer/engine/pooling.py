"""Pooling: from the hidden states of a text's tokens to one vector, chunk by chunk. Does not import torch.

The modes are those of sentence-transformers' `Pooling` module (sbert.net), which defines the results. Sums are in float64 and
add one row after another, so that the vector does not depend on how a text is split into chunks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class Pooling:
    """How a text's hidden states become one vector.

    Attributes:
        modes: "cls" (the first token), "lasttoken", "max", "mean", "mean_sqrt_len_tokens" (the sum divided by the square root
            of the number of tokens) and "weightedmean" (weights 1, 2, ... by position); vectors of several are concatenated.
        skip: number of tokens at the start of the text, those of a prompt, that are not pooled.
    """

    modes: tuple[str, ...] = ("mean",)
    skip: int = 0


class Pooler:
    """Pools the rows of one text.

    Args:
        pooling: how.
    """

    def __init__(self, pooling: Pooling) -> None:
        self._pooling, self._seen, self._weight = pooling, 0, 0
        self._first: Any = None
        self._last: Any = None
        self._max: Any = None
        self._sum: Any = None
        self._weighted: Any = None

    def add(self, rows: npt.NDArray[np.float32]) -> None:
        """Adds the hidden states of the next tokens, float32 [n, H]."""
        begin, self._seen = self._seen, self._seen + len(rows)
        skipped = max(0, self._pooling.skip - begin)
        rows, begin = rows[skipped:], begin + skipped
        if not len(rows):
            return
        modes = self._pooling.modes
        self._first, self._last = rows[0] if self._first is None else self._first, rows[-1]
        if "max" in modes:
            largest = rows.max(axis=0)
            self._max = largest if self._max is None else np.maximum(self._max, largest)
        if "mean" in modes or "mean_sqrt_len_tokens" in modes:
            self._sum = _added(self._sum, rows.astype(np.float64))
        if "weightedmean" in modes:
            weights = np.arange(begin + 1, begin + 1 + len(rows), dtype=np.float64)
            self._weighted = _added(self._weighted, rows * weights[:, None])
            self._weight += int(weights.sum())

    def vector(self) -> npt.NDArray[np.float32]:
        """The vector of the rows added so far, float32 [H x number of modes]; at least one must have been pooled."""
        tokens = self._seen - self._pooling.skip
        vectors = []
        for mode in self._pooling.modes:
            if mode == "cls":
                vector = self._first
            elif mode == "lasttoken":
                vector = self._last
            elif mode == "max":
                vector = self._max
            elif mode == "mean":
                vector = self._sum / tokens
            elif mode == "mean_sqrt_len_tokens":
                vector = self._sum / math.sqrt(tokens)
            else:
                vector = self._weighted / self._weight
            vectors.append(np.asarray(vector, np.float32))
        return np.concatenate(vectors)


def pooled(rows: npt.NDArray[np.float32], pooling: Pooling) -> npt.NDArray[np.float32]:
    """The vector of a whole text, float32 [H x number of modes].

    Args:
        rows: its hidden states, float32 [n, H].
        pooling: how.
    """
    pooler = Pooler(pooling)
    pooler.add(rows)
    return pooler.vector()


def _added(total: npt.NDArray[np.float64] | None, rows: npt.NDArray[np.float64]) -> Any:
    return np.add.reduce(rows if total is None else np.concatenate([total[None], rows]), axis=0)
