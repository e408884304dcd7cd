"""Tokens that a proposer drafts for a sequence."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Draft:
    """Tokens proposed to follow a sequence's own.

    Attributes:
        q: float32 numpy [V] of each, the distribution it was drawn from; None: it was chosen for certain. What sampling must
            know to keep the model's distribution.
    """

    tokens: list[int] = field(default_factory=list)
    q: list[Any] | None = None
