"""Draft tokens of speculative decoding."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Draft:
    """Draft tokens for one sequence.

    Attributes:
        tokens: proposed token ids, which continue the sequence.
        q: for each token the distribution it was sampled from, float32 numpy [V]; None: tokens were chosen deterministically.
            Verification needs it to preserve the model's distribution.
    """

    tokens: list[int] = field(default_factory=list)
    q: list[Any] | None = None
