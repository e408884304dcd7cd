"""The importance of experts: how many tokens of the text the router sends to each.

Experts that are never chosen do nothing on the text, whatever their weights are.
"""

from __future__ import annotations

import torch


class Uses:
    """Counts the tokens that each of a layer's experts gets. Attribute `counts`: int64 [E]."""

    def __init__(self, experts: int) -> None:
        self.counts = torch.zeros(experts, dtype=torch.int64, device="cpu")

    def add(self, expert: int, x: torch.Tensor, h: torch.Tensor) -> None:
        """Adds the tokens x, [n, H], that an expert got. The signature is that of `PackedExperts.listener`."""
        self.counts[expert] += len(x)
