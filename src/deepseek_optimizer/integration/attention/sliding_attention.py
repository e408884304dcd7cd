"""`attn_implementation="dso_sliding"`: attention to a window and sinks for plain Transformers models.

    import deepseek_optimizer
    model = AutoModelForCausalLM.from_pretrained(path, attn_implementation="dso_sliding")
    model.config.dso_window, model.config.dso_sinks = 1024, 4  # 4096 and 4 where the config has none

A token sees itself, the tokens before it that are less than `dso_window` away, and the first `dso_sinks` of its row behind the
padding, all within what the model's own mask lets it see: a layer whose model gave it a window does not see past that one
(StreamingLLM, section 3; Xiao et al. 2023). Positions stay those of the text, and Transformers' cache stays whole.

No mask of all pairs is made: what the mask interface returns says by positions which keys are seen, and the attention asks it a
piece of the queries at a time, with the keys that these can see. Memory and time grow with the length, not its square. Three
kinds of mask are made in full all the same: of several texts packed into one row, where a model or a caller adds a pattern of
its own, and where a model needs a tensor (DeepSeek V3.2's indexer; as in `attention_optimization="sliding"`, its choice is not
asked here). A mask of four dimensions that a caller made is taken as it is, and attention that is not causal is Transformers'.
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

_SCORE_BYTES = 64 << 20  # of one piece: what a kernel that does not work in tiles would take
_REFUSED = ("softcap", "position_bias", "s_aux")  # change the softmax itself

Seen = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Piece:
    """The keys that some queries need: columns of `sinks` int64 [B or 1, S] (None: none apart), and those from `low` to `high`.

    Attributes:
        seen: bool [B or 1, 1, queries, S + high - low].
    """

    low: int
    high: int
    sinks: torch.Tensor | None
    seen: torch.Tensor

    def take(self, states: torch.Tensor) -> torch.Tensor:
        """Of keys or values [B, heads, columns, D] those that are needed, [B, heads, S + high - low, D]."""
        near = states[:, :, self.low : self.high]
        if self.sinks is None:
            return near
        batch, heads, _, width = states.shape
        index = self.sinks[:, None, :, None].expand(batch, heads, -1, width)
        return torch.cat((states.gather(2, index), near), 2)


@dataclass(frozen=True)
class WindowedMask:
    """Who sees whom, by positions. Stands where Transformers' models hand an attention mask on.

    Attributes:
        rule: the model's own mask function, (batch, head, query, key) -> bool, of positions in the row, padding counted.
        queries, keys: how many there are.
        query_offset, key_offset: position of the first query, and of the first key that the cache still has.
        real: bool [B, positions], what is no padding; None: all.
        first: int64 [B or 1], position of a row's first token.
    """

    rule: Seen
    queries: int
    keys: int
    query_offset: int
    key_offset: int
    window: int
    sinks: int
    first: torch.Tensor
    real: torch.Tensor | None = None
    _only: list[Piece] = field(default_factory=list, repr=False, compare=False)

    def piece(self, start: int, end: int) -> Piece:
        """For the queries from `start` to `end`. Where these are all of them, all layers share it."""
        if self._only:
            return self._only[0]
        made = self._piece(start, end)
        if (start, end) == (0, self.queries):
            self._only.append(made)
        return made

    def _piece(self, start: int, end: int) -> Piece:
        device = self.first.device
        query = torch.arange(start, end, device=device, dtype=torch.int64)[:, None] + self.query_offset
        low = min(max(0, self.query_offset + start - self.window + 1 - self.key_offset), self.keys)
        high = max(low, min(self.keys, self.query_offset + end - self.key_offset))
        seen = self.sees(query, torch.arange(low, high, device=device, dtype=torch.int64) + self.key_offset)
        if not self.sinks or low == 0:
            return Piece(low, high, None, seen)
        key = self.first[:, None] + torch.arange(self.sinks, device=device, dtype=torch.int64)
        apart = (key >= self.key_offset) & (key < self.key_offset + low)  # the others are near, or the cache has dropped them
        column = (key - self.key_offset).clamp(0, low - 1)
        sunk = self.sees(query, (column + self.key_offset)[:, None, None]) & apart[:, None, None]
        rows = max(len(seen), len(sunk))
        return Piece(low, high, column, torch.cat([s.expand(rows, *s.shape[1:]) for s in (sunk, seen)], -1))

    def sees(self, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        """bool [B or 1, 1, queries, keys] for positions that broadcast to that."""
        batch = torch.arange(len(self.first), device=self.first.device, dtype=torch.int64)[:, None, None, None]
        seen = self.rule(batch, torch.zeros_like(batch), query, key)
        seen = seen & self.near(query, key, self.first[:, None, None, None])
        return seen if self.real is None else seen & self.real[batch, key]

    def near(self, query: torch.Tensor, key: torch.Tensor, first: torch.Tensor) -> torch.Tensor:
        """Whether a key is in the window or a sink of a text that begins at position `first`."""
        return (query - key < self.window) | (key - first < self.sinks)

    def on(self, device: torch.device) -> WindowedMask:
        """For a layer on another device than the embedding's. The rule's own tensors, where it has any, stay."""
        if self.first.device == device:
            return self
        real = None if self.real is None else self.real.to(device)
        return replace(self, first=self.first.to(device), real=real, _only=[])


def sliding_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | torch.Tensor = 0,
    kv_offset: int = 0,
    mask_function: Seen | None = None,
    attention_mask: torch.Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    config: Any = None,
    **kwargs: Any,
) -> WindowedMask | torch.Tensor | None:
    """For Transformers' `AttentionMaskInterface`: see `transformers.masking_utils.sdpa_mask`, whose arguments these are."""
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
    # A text begins where its queries' sight does: in a row of several texts not at the first token. With a window of the
    # model's own sight begins later, and a row has one text.
    first = full.int().argmax(-1)[..., None] if local_size is None and kv_offset == 0 else first[:, None, None, None]
    return full & mask.near(query, torch.arange(kv_length, device=device, dtype=torch.int64) + kv_offset, first)


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
    """For Transformers' `AttentionInterface`: queries [B, heads, Q, D], keys and values [B, kv_heads, K, D or another width] ->
    [B, Q, heads, width of the values], and no attention weights.

    Raises:
        UnsupportedRequestError: the model has its own arithmetic inside the softmax.
    """
    for name in _REFUSED:
        if kwargs.get(name) is not None:
            raise UnsupportedRequestError(f'{type(module).__name__}: "dso_sliding" has no {name}; use "eager"')
    causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    if attention_mask is None and causal:
        attention_mask = _by_length(module, query, key, kwargs.get("sliding_window"))
    if not isinstance(attention_mask, WindowedMask):
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **kwargs
        )
    return _in_pieces(query, key, value, attention_mask.on(query.device), dropout, scaling), None


def _in_pieces(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: WindowedMask, dropout: float, scaling: float | None
) -> torch.Tensor:
    batch, heads, count, width = query.shape
    kv_heads = key.shape[1]
    groups = heads // kv_heads
    most = min(key.shape[2], mask.sinks + mask.window)
    step = max(16, _SCORE_BYTES // (4 * batch * heads * (most + 512)))
    step = min(count, step, 512)
    pieces = []
    for start in range(0, count, step):
        end = min(start + step, count)
        piece = mask.piece(start, end)
        # Heads that share keys are rows of one product, so that keys and values need not be repeated.
        rows = query[:, :, start:end].reshape(batch, kv_heads, groups * (end - start), width)
        made = F.scaled_dot_product_attention(
            rows, piece.take(key), piece.take(value), attn_mask=piece.seen.repeat(1, 1, groups, 1), dropout_p=dropout,
            scale=scaling,
        )  # fmt: skip
        pieces.append(made.view(batch, heads, end - start, -1).transpose(1, 2))
    return torch.cat(pieces, 1)


def _by_length(module: Any, query: torch.Tensor, key: torch.Tensor, own_window: int | None) -> WindowedMask:
    """Where a model asks for no mask: no padding, and the last query is the last key's."""
    rule: Any = causal_mask_function if own_window is None else sliding_window_causal_mask_function(own_window)
    first = torch.zeros(1, dtype=torch.int64, device=query.device)
    queries, keys = query.shape[2], key.shape[2]
    return WindowedMask(rule, queries, keys, keys - queries, 0, *_window_of(module.config), first)


def _window_of(config: Any) -> tuple[int, int]:
    """Window and sinks of a model's config. Raises ConfigError."""
    window, sinks = getattr(config, "dso_window", None), getattr(config, "dso_sinks", None)
    return (
        whole("dso_window", WINDOWS["sliding"] if window is None else window, 1, MAX_WINDOW),
        whole("dso_sinks", DeepSeekConfig.attention_sinks if sinks is None else sinks, 0, MAX_SINKS),
    )
