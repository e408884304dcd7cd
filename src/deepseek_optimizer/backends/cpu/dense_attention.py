"""Attention over keys and values in ordinary tensors, as Transformers' caches hold them.

    o = softmax(scale q k^T + mask) v

in fp32; with more than a few queries, products of bf16 tensors, and of those that may be rounded, are those of bf16. In
decoding, torch's kernels for scaled dot-product attention take several times as long as reading keys and values does. In
prompts they run on one thread, since torch's threads would compete with the backend's.
"""

from __future__ import annotations

import ctypes as C

import torch

from .buffers import strided
from .native import Context
from .native_train import TYPES
from .structs import DenseAttention, DenseHeads

_MASK_BYTES, _MASK_NUMBERS, _MASK_CAUSAL = 1, 2, 3  # DSO_MASK_*


def attend(
    context: Context,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    mask: torch.Tensor | None = None,
    *,
    causal: bool = False,
    rounded: bool = False,
) -> torch.Tensor:
    """`Backend.attend` on the threads of `context`.

    Args:
        rounded: whether products of fp32 tensors may be those of bf16.
    """
    batch, heads, queries, width = q.shape
    kv_heads, keys, v_width = v.shape[1:]
    # [B, S, H, Dv] in memory, since the heads of a token are joined next.
    out = context.outputs.empty((batch, queries, heads, v_width), q.dtype, short_lived=True).transpose(1, 2)
    task = DenseAttention(
        type=TYPES[str(q.dtype).removeprefix("torch.")], batch=batch, heads=heads, kv_heads=kv_heads, queries=queries,
        keys=keys, qk_width=width, v_width=v_width, scale=scale, rounded=rounded,
        q=_heads(q, "q", q.dtype, (batch, heads, queries, width)), k=_heads(k, "k", q.dtype, (batch, kv_heads, keys, width)),
        v=_heads(v, "v", q.dtype, (batch, kv_heads, keys, v_width)), o=_heads(out, "o", q.dtype, tuple(out.shape)),
    )  # fmt: skip
    if mask is None:
        task.mask_type = _MASK_CAUSAL if causal else 0
    else:
        mask = mask.expand(batch, heads, queries, keys)
        kind = torch.bool if mask.dtype == torch.bool else q.dtype
        task.mask_type = _MASK_BYTES if kind == torch.bool else _MASK_NUMBERS
        task.mask = _heads(mask, "mask", kind, (batch, heads, queries, keys))
    context.call("dso_attend", context.handle, C.byref(task), o=out)
    return out


def _heads(x: torch.Tensor, name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> DenseHeads:
    place = strided(x, name, dtype, shape)
    return DenseHeads(place, x.stride(0), x.stride(1), x.stride(2))
