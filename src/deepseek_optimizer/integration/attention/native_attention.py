"""Attention for models without a plan: Transformers' `sdpa`, computed by the model's backend.

A model's methods say which backend that is (`attention_of`), for the thread that runs them. Outside of them, as when a part of
the model is called alone, `sdpa` itself computes attention. So it does in training, for other dtypes and devices, and for
arguments that only `sdpa` knows; masks are the same for both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any

import torch

from ...backends.base import DEFAULTS, Backend, CompileOptions
from .transformers_sdpa import create_position_bias_mask, sdpa_attention_forward

_DTYPES = (torch.float32, torch.bfloat16)  # of `Backend.attend`
_attend: ContextVar[Callable[..., torch.Tensor] | None] = ContextVar("dso_attention", default=None)


@contextmanager
def attention_of(backend: Backend, options: CompileOptions = DEFAULTS) -> Iterator[None]:
    """Lets a backend compute the attention of this thread's models that call `native_attention`, if it is fast at that."""
    token = _attend.set(partial(backend.attend, options=options) if backend.capabilities.dense_operations else None)
    try:
        yield
    finally:
        _attend.reset(token)


def native_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Transformers' attention function; see `sdpa_attention_forward` for arguments and result.

    Args:
        query: [batch, heads, queries, width].
        key, value: [batch, kv heads, keys, width].
        attention_mask: broadcastable to [batch, heads, queries, keys]: bool, or added to the scores; None: as `is_causal` says.
        position_bias: added to the scores.
    """
    causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    hides = causal and attention_mask is None and query.shape[2] > 1  # keys after a query's own, counted from the first key
    partly = hides and query.shape[2] != key.shape[2]
    # In training, a layer may run twice, without and with gradients (checkpoints of activations): both times in the same way.
    attend = None if torch.compiler.is_compiling() or module.training else _attend.get()
    if attend is None or partly or not _supported(query, key, value, attention_mask, position_bias, dropout):
        result: tuple[torch.Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal,
            **({} if position_bias is None else {"position_bias": position_bias}), **kwargs,
        )  # fmt: skip
        return result
    mask = attention_mask
    if position_bias is not None:
        mask = create_position_bias_mask(position_bias, mask, is_causal=hides, query=query, key=key)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if mask is not None:
        mask = mask[..., : key.shape[2]]
        if mask.shape[-1] != 1 and mask.stride(-1) != 1:
            mask = mask.contiguous()
    out = attend(_dense(query), _dense(key), _dense(value), scale, mask, causal=hides)
    return out.transpose(1, 2).contiguous(), None


def _dense(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _supported(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, bias: Any, dropout: float) -> bool:
    """Whether `Backend.attend` computes what `sdpa` would."""
    tensors = (query, key, value)
    if dropout or query.dtype not in _DTYPES or torch.is_autocast_enabled(query.device.type):
        return False
    if any(type(x) is not torch.Tensor or not x.is_cpu or x.dtype != query.dtype for x in tensors):
        return False
    if torch.is_grad_enabled() and any(x.requires_grad for x in (*tensors, mask, bias) if x is not None):
        return False
    for added in (mask, bias):
        if added is not None and not (added.is_cpu and added.dtype in (torch.bool, query.dtype)):
            return False
    return len({len(x) for x in tensors}) == 1 and (mask is None or mask.shape[-1] >= key.shape[2])
