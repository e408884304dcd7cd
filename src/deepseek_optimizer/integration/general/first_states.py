"""A cache that keeps the keys and values of a prompt as they are.

Transformers' cache begins with an empty tensor and appends to it, so that a prompt's keys and values are copied once. With
encoder and decoder, those of the encoder's tokens are copied in every layer of the decoder.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import DynamicCache, EncoderDecoderCache
from transformers.cache_utils import DynamicLayer


class KeptStates(DynamicLayer):
    """A layer of the cache whose first keys and values are not copied, unless they are a part of a larger tensor."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if self.get_seq_length() or not (_whole(key_states) and _whole(value_states)):
            result: tuple[torch.Tensor, torch.Tensor] = super().update(key_states, value_states, *args, **kwargs)
            return result
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys, self.values = key_states, value_states
        return key_states, value_states


def _whole(states: torch.Tensor) -> bool:
    """Whether [batch, heads, tokens, width], as a projection or a cache stores it, has no gaps."""
    return states.numel() > 0 and (states.is_contiguous() or states.transpose(1, 2).is_contiguous())


def new_cache(config: Any) -> Any:
    """The cache that a model with encoder and decoder creates for itself."""
    caches = DynamicCache(config=config), DynamicCache(config=config)
    for cache in caches:
        cache.layers = [KeptStates() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return EncoderDecoderCache(*caches)
