"""MTP layers of DeepSeek-V4, which take and return all residual streams of a token.

The input of layer k (from 0) at row i is, for each stream, a projection of that stream's normed state after the previous layer
(for layer 0, after the model's last one), plus one of the embedding of token i + k + 1. The layer collapses its streams by
weights of its own. Source: `MTPBlock` in DeepSeek's own code for V4.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import nn

from ...integration.attention.transformers_sdpa import create_sliding_window_causal_mask
from ...integration.compat import cache_name
from .mtp_layer import step


class DraftStates:
    """Records what a model's MTP layers take while the model runs: its residual streams, or else its last hidden state.

    Args:
        decoder: the model without its head.
    """

    def __init__(self, decoder: Any) -> None:
        self._collapse: nn.Module | None = getattr(decoder, "hc_head", None)
        self._streams: torch.Tensor | None = None
        self._hook: Any = None

    def __enter__(self) -> DraftStates:
        if self._collapse is not None:
            self._hook = self._collapse.register_forward_pre_hook(self._record)
        return self

    def __exit__(self, *error: Any) -> None:
        if self._hook is not None:
            self._hook.remove()

    def _record(self, _: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        self._streams = inputs[0]

    def of(self, hidden: torch.Tensor) -> torch.Tensor:
        """The streams [B, S, n, H] of the last run, or `hidden`, its last hidden state [B, S, H], if the model has none."""
        return hidden if self._streams is None else self._streams


def has_streams(model: Any) -> bool:
    """Whether a model's layers, and so its MTP layers, take several residual streams."""
    return hasattr(model.get_decoder(), "hc_head")


def stream_states(
    model: Any,
    streams: torch.Tensor,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None,
    position_ids: torch.Tensor,
    then: Callable[..., Any] | None,
) -> Iterator[tuple[int, nn.Module, Any]]:
    """`mtp.mtp_states` of a model with residual streams; `streams` [B, S, n, H] are those after its last layer."""
    decoder, config = model.get_decoder(), model.config
    embedded = decoder.embed_tokens(input_ids)
    where = {"config": config, "inputs_embeds": embedded, "attention_mask": attention_mask, "position_ids": position_ids}
    mask = create_sliding_window_causal_mask(**where, **{cache_name(): None})
    rotation = {"main": decoder.rotary_emb(embedded, position_ids=position_ids, layer_type="main")}
    inputs = {
        "input_ids": input_ids, "position_embeddings": rotation, "position_ids": position_ids, "attention_mask": mask,
        "use_cache": False,
    }  # fmt: skip
    for depth, layer in enumerate(decoder.layers[config.num_hidden_layers :]):
        following = input_ids if hasattr(layer, "embed_tokens") else embedded
        call = None if then is None else partial(then, depth, depth, layer)
        streams, result = step(layer, streams, following, depth, call, **inputs)
        yield depth, layer, result
