"""`attn_implementation="dso_sliding"`: sliding-window attention with sinks for plain Transformers models.

    import deepseek_optimizer
    model = AutoModelForCausalLM.from_pretrained(path, attn_implementation="dso_sliding")
    model.config.dso_window, model.config.dso_sinks = 1024, 4  # defaults: 4096 and 4

A token attends to itself, to the preceding tokens less than `dso_window` away, and to the first `dso_sinks` tokens of its row
after the padding, always within the model's own mask: a layer with a window of its own attends no further than that window
(StreamingLLM, section 3; Xiao et al. 2023). Tokens keep their positions in the text, and Transformers' cache drops nothing.

The mask over all pairs of tokens is not materialized: the mask interface returns a `WindowedMask`, which computes visibility
from positions, and attention evaluates it for one chunk of queries at a time, over the keys that these can attend to. Memory
and time grow with the length, not its square. A full mask is built in three cases: several texts are packed into one row; a
model or caller adds a pattern of its own; a model needs a tensor (DeepSeek V3.2's indexer, whose selection is not applied here,
as with `attention_optimization="sliding"`). A four-dimensional mask from the caller is used unchanged, and non-causal attention
is left to Transformers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F

from ...config import WINDOWS, DeepSeekConfig
from ...errors import UnsupportedRequestError
from .transformers_sdpa import (
    causal_mask_function,
    prepare_padding_mask,
    sdpa_attention_forward,
    sdpa_mask,
    sliding_window_causal_mask_function,
)
from .window_mask import MAX_SINKS, MAX_WINDOW, whole

_SCORE_BYTES = 64 << 20  # limit on the scores of one chunk, for kernels that do not work in tiles
_REFUSED = ("softcap", "position_bias", "s_aux")  # change the softmax itself

MaskFunction = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class KeyRange:
    """The keys that a chunk of queries can attend to, and which query attends to which of them.

    Attributes:
        low, high: columns [low, high) of the keys.
        sinks: columns of the sinks outside that range, int64 [B or 1, S]; None: there are none.
        visible: bool [B or 1, 1, queries, S + high - low].
    """

    low: int
    high: int
    sinks: torch.Tensor | None
    visible: torch.Tensor

    def take(self, states: torch.Tensor) -> torch.Tensor:
        """Selects these columns of keys or values [B, heads, columns, D] -> [B, heads, S + high - low, D]."""
        near = states[:, :, self.low : self.high]
        if self.sinks is None:
            return near
        batch, heads, _, width = states.shape
        index = self.sinks[:, None, :, None].expand(batch, heads, -1, width)
        return torch.cat((states.gather(2, index), near), 2)


@dataclass(frozen=True)
class WindowedMask:
    """Which query attends to which key, computed from positions. Transformers' models pass it on in place of a mask tensor.

    Attributes:
        rule: the model's own mask function, (batch, head, query, key) -> bool, of positions in the row including padding.
        queries, keys: their numbers.
        query_offset, key_offset: position of the first query, and of the first key in the cache.
        window: maximum number of tokens a query attends to before the sinks are added, itself included.
        sinks: number of first tokens of a text that stay visible.
        first: int64 [B or 1], position of each row's first token.
        real: bool [B, positions], False for padding; None: no padding.
    """

    rule: MaskFunction
    queries: int
    keys: int
    query_offset: int
    key_offset: int
    window: int
    sinks: int
    first: torch.Tensor
    real: torch.Tensor | None = None
    _cached: list[KeyRange] = field(default_factory=list, repr=False, compare=False)

    def key_range(self, start: int, end: int) -> KeyRange:
        """The keys visible to queries [start, end). If these are all queries, the result is cached for all layers."""
        if self._cached:
            return self._cached[0]
        keys = self._key_range(start, end)
        if (start, end) == (0, self.queries):
            self._cached.append(keys)
        return keys

    def _key_range(self, start: int, end: int) -> KeyRange:
        device = self.first.device
        query = torch.arange(start, end, device=device, dtype=torch.int64)[:, None] + self.query_offset
        low = min(max(0, self.query_offset + start - self.window + 1 - self.key_offset), self.keys)
        high = max(low, min(self.keys, self.query_offset + end - self.key_offset))
        visible = self.visible(query, torch.arange(low, high, device=device, dtype=torch.int64) + self.key_offset)
        if not self.sinks or low == 0:
            return KeyRange(low, high, None, visible)
        key = self.first[:, None] + torch.arange(self.sinks, device=device, dtype=torch.int64)
        outside = (key >= self.key_offset) & (key < self.key_offset + low)  # the others are in range, or dropped by the cache
        column = (key - self.key_offset).clamp(0, low - 1)
        sinks = self.visible(query, (column + self.key_offset)[:, None, None]) & outside[:, None, None]
        rows = max(len(visible), len(sinks))
        return KeyRange(low, high, column, torch.cat([s.expand(rows, *s.shape[1:]) for s in (sinks, visible)], -1))

    def visible(self, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        """Whether queries attend to keys, bool [B or 1, 1, queries, keys], for positions that broadcast to that shape."""
        batch = torch.arange(len(self.first), device=self.first.device, dtype=torch.int64)[:, None, None, None]
        visible = self.rule(batch, torch.zeros_like(batch), query, key)
        visible = visible & self.in_window(query, key, self.first[:, None, None, None])
        return visible if self.real is None else visible & self.real[batch, key]

    def in_window(self, query: torch.Tensor, key: torch.Tensor, first: torch.Tensor) -> torch.Tensor:
        """Whether a key is in the query's window, or a sink of a text that begins at position `first`."""
        return (query - key < self.window) | (key - first < self.sinks)

    def on(self, device: torch.device) -> WindowedMask:
        """This mask for a layer on another device than the embedding. Tensors that the rule itself holds are not moved."""
        if self.first.device == device:
            return self
        real = None if self.real is None else self.real.to(device)
        return replace(self, first=self.first.to(device), real=real, _cached=[])


def sliding_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | torch.Tensor = 0,
    kv_offset: int = 0,
    mask_function: MaskFunction | None = None,
    attention_mask: torch.Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    config: Any = None,
    **kwargs: Any,
) -> WindowedMask | torch.Tensor | None:
    """The mask for Transformers' `AttentionMaskInterface`, with the arguments of `transformers.masking_utils.sdpa_mask`.

    Returns: a `WindowedMask`; a bool tensor where the caller needs a tensor; for non-causal attention what `sdpa_mask` returns.
    """
    rule: Any = mask_function or causal_mask_function
    given: dict[str, Any] = {
        "batch_size": batch_size, "q_length": q_length, "kv_length": kv_length, "q_offset": q_offset, "kv_offset": kv_offset,
        "mask_function": rule, "attention_mask": attention_mask, "use_vmap": use_vmap, "device": device,
    }  # fmt: skip
    if "allow_is_bidirectional_skip" in kwargs:  # not causal
        return sdpa_mask(**given, local_size=local_size, allow_is_causal_skip=allow_is_causal_skip, **kwargs)
    real: Any = prepare_padding_mask(attention_mask, kv_length, kv_offset)
    first = torch.zeros(1, dtype=torch.int64, device=device)
    if real is not None:
        real = real.to(device)
        first = real.int().argmax(-1)
    mask = WindowedMask(rule, q_length, kv_length, int(q_offset), kv_offset, *_window_of(config), first, real)
    if allow_is_causal_skip and not use_vmap:
        return mask
    full: Any = sdpa_mask(**given, allow_is_causal_skip=False)
    query = torch.arange(q_length, device=device, dtype=torch.int64)[:, None] + q_offset
    # Each text begins at the first key visible to its queries, since a row may hold several texts. If the model has a window of
    # its own, the first visible key is later than that, but then a row holds one text.
    first = full.int().argmax(-1)[..., None] if local_size is None and kv_offset == 0 else first[:, None, None, None]
    return full & mask.in_window(query, torch.arange(kv_length, device=device, dtype=torch.int64) + kv_offset, first)


def sliding_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """The attention function for Transformers' `AttentionInterface`.

    Args:
        module: the attention layer.
        query: [B, heads, Q, D].
        key, value: [B, kv_heads, K, D]; values may have another width.
        attention_mask: from `sliding_mask`; None in a causal layer: computed from the lengths; a tensor is used unchanged.
        dropout, scaling, is_causal: as in `sdpa_attention_forward`.

    Returns: [B, Q, heads, width of the values], and None for the attention weights.

    Raises:
        UnsupportedRequestError: the model changes the softmax (soft capping, a position bias, learned sinks).
    """
    for name in _REFUSED:
        if kwargs.get(name) is not None:
            raise UnsupportedRequestError(f'{type(module).__name__}: "dso_sliding" does not support {name}; use "eager"')
    causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    if attention_mask is None and causal:
        attention_mask = _by_length(module, query, key, kwargs.get("sliding_window"))
    if not isinstance(attention_mask, WindowedMask):
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **kwargs
        )
    return _in_chunks(query, key, value, attention_mask.on(query.device), dropout, scaling), None


def _in_chunks(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: WindowedMask, dropout: float, scaling: float | None
) -> torch.Tensor:
    batch, heads, count, width = query.shape
    kv_heads = key.shape[1]
    groups = heads // kv_heads
    max_keys = min(key.shape[2], mask.sinks + mask.window)
    step = max(16, _SCORE_BYTES // (4 * batch * heads * (max_keys + 512)))
    step = min(count, step, 512)
    chunks = []
    for start in range(0, count, step):
        end = min(start + step, count)
        keys = mask.key_range(start, end)
        # Heads that share keys are rows of one product, so that keys and values need not be repeated.
        rows = query[:, :, start:end].reshape(batch, kv_heads, groups * (end - start), width)
        out = F.scaled_dot_product_attention(
            rows, keys.take(key), keys.take(value), attn_mask=keys.visible.repeat(1, 1, groups, 1), dropout_p=dropout,
            scale=scaling,
        )  # fmt: skip
        chunks.append(out.view(batch, heads, end - start, -1).transpose(1, 2))
    return torch.cat(chunks, 1)


def _by_length(module: Any, query: torch.Tensor, key: torch.Tensor, own_window: int | None) -> WindowedMask:
    """The mask for a model that requested none: there is no padding, and the last query belongs to the last key."""
    rule: Any = causal_mask_function if own_window is None else sliding_window_causal_mask_function(own_window)
    first = torch.zeros(1, dtype=torch.int64, device=query.device)
    queries, keys = query.shape[2], key.shape[2]
    return WindowedMask(rule, queries, keys, keys - queries, 0, *_window_of(module.config), first)


def _window_of(config: Any) -> tuple[int, int]:
    """The window and the number of sinks in a model's config; ConfigError if one is not valid."""
    window, sinks = getattr(config, "dso_window", None), getattr(config, "dso_sinks", None)
    return (
        whole("dso_window", WINDOWS["sliding"] if window is None else window, 1, MAX_WINDOW),
        whole("dso_sinks", DeepSeekConfig.attention_sinks if sinks is None else sinks, 0, MAX_SINKS),
    )
