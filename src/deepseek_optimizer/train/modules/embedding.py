"""Embeddings, for training."""

from __future__ import annotations

import torch
from torch import nn

from ..ops.embedding import embedding


class TrainedEmbedding(nn.Module):
    """Embedding lookup with a native gradient; a mixin for `nn.Embedding`."""

    weight: torch.Tensor
    padding_idx: int | None

    @staticmethod
    def fits(module: nn.Module) -> bool:
        """Only `nn.Embedding` itself, without max_norm, sparse gradients or scaling by frequency."""
        return type(module) is nn.Embedding and module.max_norm is None and not module.sparse and not module.scale_grad_by_freq

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """[...] -> [..., H]."""
        return embedding(input, self.weight, self.padding_idx)
