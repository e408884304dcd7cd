"""The oracle for windows of the cache: Transformers' own model over keys that are cached BEFORE RoPE, and rotated to their
current positions each time attention reads them. No key is ever rotated back.

The remaining keys and values were computed from the whole text before them, including dropped tokens.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import DynamicCache

FUNCTIONS = ("apply_rotary_pos_emb", "apply_rotary_pos_emb_interleave", "apply_rotary_emb")


class LateRope:
    """One sequence of a model, in float32."""

    def __init__(self, model: Any) -> None:
        self.model, self.cache = model, _Cache(model)

    @torch.no_grad()
    def read(self, ids: list[int]) -> torch.Tensor:
        """Logits of the next tokens, float32 [T, V]. Their positions continue after the tokens in the cache."""
        seen = self.cache.get_seq_length()
        positions = torch.arange(seen, seen + len(ids))[None]
        with _keys_untouched(self.model) as functions:
            self.cache.functions = functions
            made = self.model(torch.tensor([ids]), position_ids=positions, past_key_values=self.cache, use_cache=True)
        return made.logits[0]

    def drop(self, begin: int, end: int) -> None:
        """Drops tokens [begin, end); later tokens move forward."""
        for layer in self.cache.layers:
            for name in ("keys", "values"):
                kept = getattr(layer, name)
                setattr(layer, name, torch.cat((kept[:, :, :begin], kept[:, :, end:]), 2))
            if (indexer := getattr(layer, "indexer_keys", None)) is not None:
                layer.indexer_keys = torch.cat((indexer[:, :begin], indexer[:, end:]), 1)


class _Cache(DynamicCache):
    def __init__(self, model: Any) -> None:
        sparse = model.config.model_type == "deepseek_v32"
        super().__init__(config=model.config if sparse else None)  # None: sliding layers store all tokens
        self.model, self.latent = model, hasattr(model.config, "kv_lora_rank")
        self.functions: dict[str, Any] = {}

    def update(self, keys: torch.Tensor, values: torch.Tensor, layer: int, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """Stores keys and values; with latent attention, latents and shared keys, in this order."""
        keys, values = super().update(keys, values, layer, *args, **kwargs)
        if not self.latent:
            return self._rotated(keys), values
        interleaved = getattr(self.model.config, "rope_interleave", None)
        if interleaved is None:  # a family with only one layout
            interleaved = "apply_rotary_pos_emb_interleave" in self.functions
        return keys, self._rotated(values, "apply_rotary_pos_emb_interleave" if interleaved else None)

    def update_indexer(self, keys: torch.Tensor, layer: int) -> torch.Tensor:
        keys = super().update_indexer(keys, layer)
        rot = self.model.config.qk_rope_head_dim
        turned = self._rotated(keys[:, None, :, :rot], "apply_rotary_pos_emb")
        return torch.cat((turned[:, 0], keys[..., rot:]), -1)

    def _rotated(self, keys: torch.Tensor, name: str | None = None) -> torch.Tensor:
        """Keys [1, heads, T, rot] rotated to positions 0 to T - 1 by the model's own function."""
        table = self.model.model.rotary_emb(keys, torch.arange(keys.shape[2])[None])
        table = table if isinstance(table, tuple) else (table,)
        function = self.functions[name or next(n for n in ("apply_rotary_emb", "apply_rotary_pos_emb") if n in self.functions)]
        return function(keys, keys, *table)[1]


@contextmanager
def _keys_untouched(model: Any) -> Iterator[dict[str, Any]]:
    """While it is active, the RoPE functions of this model's module rotate queries only; yields the original functions."""
    module = sys.modules[type(model).__module__]
    functions = {name: getattr(module, name) for name in FUNCTIONS if hasattr(module, name)}

    def only_queries(function: Any) -> Any:
        return lambda q, k, *args, **kwargs: (function(q, k, *args, **kwargs)[0], k)

    try:
        for name, function in functions.items():
            setattr(module, name, only_queries(function))
        yield functions
    finally:
        for name, function in functions.items():
            setattr(module, name, function)
