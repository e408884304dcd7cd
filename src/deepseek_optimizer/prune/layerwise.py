"""A model that runs layer by layer on texts, so that some layers can be left out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ..integration.bind.graphs import decoder_path
from ..integration.load.layer_calls import LayerCalls

Hidden = list[torch.Tensor]  # [1, n, H] for each text


class Layerwise:
    """Runs the layers of a model on hidden states.

    Args:
        model: a causal language model whose decoder has `layers` and `norm`.
        texts: token ids, int64 [1, n] each.
        every: only the distribution at each `every`-th token is computed, since the head of a small model takes longer than its
            layers.

    Attributes:
        layers: the layers, without those for multi-token prediction.
        inputs: the hidden states that the first layer gets.
    """

    def __init__(self, model: Any, texts: Sequence[torch.Tensor], every: int = 1) -> None:
        self._every = every
        self._decoder, self._head = model.get_submodule(decoder_path(model)), model.get_output_embeddings()
        self.layers: list[nn.Module] = list(self._decoder.layers)[: model.config.num_hidden_layers]
        self._calls = LayerCalls(self._decoder, self.layers, texts)
        self.inputs: Hidden = self._calls.inputs

    def run(self, layers: Sequence[int], hidden: Hidden) -> Hidden:
        """The hidden states after these layers, one after the other."""
        states = list(hidden)
        for i in layers:
            states = [self._calls.run(self.layers[i], i, text, state) for text, state in enumerate(states)]
        return states

    def log_probabilities(self, hidden: Hidden) -> Hidden:
        """Log probabilities of the next tokens after the last layer, float32 [n / every, V] for each text."""
        states = [state[:, self._every - 1 :: self._every] for state in hidden]
        return [self._head(self._decoder.norm(state))[0].float().log_softmax(-1) for state in states]


def divergence(reference: Hidden, other: Hidden) -> float:
    """Mean KL divergence in nats per token, of log probabilities [n, V]."""
    sums = [float((p.exp() * (p - q)).sum(dtype=torch.float64)) for p, q in zip(reference, other, strict=True)]
    return sum(sums) / sum(map(len, reference))
