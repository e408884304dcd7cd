"""Causal attention over packed sequences, with gradients. Saves two values per row of the softmax instead of a score matrix.

    o = softmax(scale q k^T) v, where token t of a sequence attends to its tokens (t - window, t]

FlashAttention-2 (Dao 2023, arXiv 2307.08691), algorithms 1 and 2; the backward pass recomputes the attention weights. Every sum
has a fixed order, so results and gradients are bitwise equal for any number of threads.
"""

from __future__ import annotations

import ctypes as C
from typing import Any

import torch

from ...backends.cpu.buffers import address, strided
from ...backends.cpu.native_train import TrainAttention, TrainHeads
from . import native

MAX_WIDTH = 256


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens: torch.Tensor,
    scale: float,
    *,
    used: torch.Tensor | None = None,
    window: int = 0,
) -> torch.Tensor:
    """q [T, H, Dk], k [T, Hkv, Dk], v [T, Hkv, Dv] -> [T, H, Dv], all of one dtype; query head h uses kv head h // (H / Hkv).

    Args:
        cu_seqlens: int [n + 1], ascending from 0 to T: sequence i is tokens [cu_seqlens[i], cu_seqlens[i + 1]).
        scale: factor of the scores.
        used: int [n], the number of real tokens at the start of each sequence; the others are padding, whose outputs and
            gradients are zero. None: all.
        window: number of tokens that a token attends to, itself included; 0: all earlier ones.

    Raises:
        ValueError: invalid shapes or bounds.
    """
    if q.dim() != 3 or k.dim() != 3 or v.dim() != 3:
        raise ValueError(f"attention: q, k, v must be [T, heads, width], got {list(q.shape)}, {list(k.shape)}, {list(v.shape)}")
    bounds = cu_seqlens.to("cpu", torch.int64)
    if bounds.dim() != 1 or len(bounds) < 1 or int(bounds[0]) != 0 or int(bounds[-1]) != q.shape[0]:
        raise ValueError(f"attention: cu_seqlens must run from 0 to {q.shape[0]}, the number of tokens")
    begin, end = bounds[:-1].contiguous(), bounds[1:].contiguous()
    if used is not None:
        if used.shape != begin.shape or bool((used.cpu() > end - begin).any()) or bool((used < 0).any()):
            raise ValueError(f"attention: used must have {len(begin)} elements, none above the length of its sequence")
        end = begin + used.to("cpu", torch.int64)
    return packed_attention(q[None], k[None], v[None], begin, end, scale, window)[0]


def packed_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, begin: torch.Tensor, end: torch.Tensor, scale: float, window: int = 0
) -> torch.Tensor:
    """`attention` for batches: q [B, S, H, Dk], k [B, S, Hkv, Dk], v [B, S, Hkv, Dv], of any strides -> [B, S, H, Dv].

    Args:
        begin, end: int64 [n] on the CPU, ascending: sequence i is tokens [begin[i], end[i]) of the flattened B * S, and does
            not cross the end of a row. Tokens between sequences are padding, whose outputs and gradients are zero.
        scale, window: see `attention`.

    Raises:
        ValueError: invalid shapes or bounds.
    """
    if torch.is_autocast_enabled(q.device.type):
        dtype = torch.get_autocast_dtype(q.device.type)
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    _check(q, k, v, begin, end, window)
    fits = max(q.shape[-1], v.shape[-1]) <= MAX_WIDTH and q.shape[-1] % 2 == v.shape[-1] % 2 == 0
    if not (fits and native.usable(q, k, v)):
        return packed_attention_reference(q, k, v, begin, end, scale, window)
    result: torch.Tensor = _forward(q, k, v, begin.contiguous(), end.contiguous(), scale, window)[0]
    return result


def packed_attention_reference(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, begin: torch.Tensor, end: torch.Tensor, scale: float, window: int = 0
) -> torch.Tensor:
    """`packed_attention` in plain torch with autograd; bf16 and fp16 are computed in fp32 and rounded once."""
    group = q.shape[2] // k.shape[2]
    dtype = torch.promote_types(q.dtype, torch.float32)
    query, key, value = (x.flatten(0, 1).transpose(0, 1).to(dtype) for x in (q, k, v))  # [heads, B * S, width]
    chunks, at = [], 0
    for first, last in zip(begin.tolist(), end.tolist(), strict=True):
        if last == first:
            continue
        if first > at:
            chunks.append(query.new_zeros(q.shape[2], first - at, v.shape[3]))
        keys, values = (x[:, first:last].repeat_interleave(group, 0) for x in (key, value))
        t = torch.arange(last - first, device=q.device, dtype=torch.int64)
        visible = t[:, None] >= t
        if window:
            visible &= t[:, None] - t < window
        logits = (query[:, first:last] @ keys.transpose(1, 2) * scale).masked_fill(~visible, float("-inf"))
        chunks.append(logits.softmax(-1) @ values)
        at = last
    tokens = query.shape[1]
    if tokens > at or not chunks:
        chunks.append(query.new_zeros(q.shape[2], tokens - at, v.shape[3]))
    return torch.cat(chunks, 1).transpose(0, 1).unflatten(0, q.shape[:2]).to(q.dtype)


def _check(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, begin: torch.Tensor, end: torch.Tensor, window: int) -> None:
    shapes = f"q is {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}"
    if not (q.dim() == k.dim() == v.dim() == 4 and q.shape[:2] == k.shape[:2] == v.shape[:2] and k.shape[2] == v.shape[2]):
        raise ValueError(f"attention: {shapes}; batch and tokens must be equal, and k and v must have as many heads")
    if (
        k.shape[2] < 1
        or q.shape[2] < 1
        or q.shape[2] % k.shape[2]
        or q.shape[3] != k.shape[3]
        or not q.shape[3]
        or not v.shape[3]
    ):
        raise ValueError(f"attention: {shapes}; q must have a multiple of k's heads, and heads of the same width")
    if not q.dtype == k.dtype == v.dtype or not q.dtype.is_floating_point:
        raise ValueError(f"attention: q is {q.dtype}, k {k.dtype}, v {v.dtype}; they must have the same floating-point dtype")
    if window < 0:
        raise ValueError(f"attention: window must not be negative, got {window}")
    if (
        begin.dtype != torch.int64
        or end.dtype != torch.int64
        or begin.dim() != 1
        or begin.shape != end.shape
        or not begin.is_cpu
    ):
        raise ValueError("attention: begin and end must be int64 tensors of the same length on the CPU")
    tokens = q.shape[0] * q.shape[1]
    before = torch.cat((begin.new_zeros(1), end))
    if bool((begin < before[:-1]).any()) or bool((end < begin).any()) or int(before[-1]) > tokens:
        raise ValueError(f"attention: sequences must be in ascending order within {tokens} tokens, without overlap")
    row = max(q.shape[1], 1)
    if bool(((end > begin) & (begin // row != (end - 1) // row)).any()):
        raise ValueError(f"attention: a sequence crosses the end of a row of {row} tokens")


@torch.library.custom_op("dso::train_attention", mutates_args=())
def _forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, begin: torch.Tensor, end: torch.Tensor, scale: float, window: int
) -> tuple[torch.Tensor, torch.Tensor]:
    q, k, v = (_dense_heads(x) for x in (q, k, v))
    o = native.new((*q.shape[:3], v.shape[3]), q)
    state = native.new((2, q.shape[2], q.shape[0] * q.shape[1]), q, torch.float32)
    if not _cover(begin, end, q):
        o.zero_()
        state.zero_()
    call = _call(q, k, v, o, state, begin, end, scale, window)
    native.call("dso_train_attention_forward", C.byref(call), o=o, state=state)
    return o, state


@_forward.register_fake
def _forward_fake(q: Any, k: Any, v: Any, begin: Any, end: Any, scale: float, window: int) -> Any:
    tokens = q.shape[0] * q.shape[1]
    return q.new_empty(*q.shape[:3], v.shape[3]), q.new_empty(2, q.shape[2], tokens, dtype=torch.float32)


@torch.library.custom_op("dso::train_attention_backward", mutates_args=())
def _backward(
    o_grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    o: torch.Tensor,
    state: torch.Tensor,
    begin: torch.Tensor,
    end: torch.Tensor,
    scale: float,
    window: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    o_grad, q, k, v = (_dense_heads(x) for x in (o_grad, q, k, v))
    gradients = [native.new(x.shape, x) for x in (q, k, v)]
    if not _cover(begin, end, q):
        for gradient in gradients:
            gradient.zero_()
    call = _call(q, k, v, o, state, begin, end, scale, window)
    call.o_grad = _heads(o_grad, "o_grad", o)
    call.q_grad, call.k_grad, call.v_grad = (_heads(g, "a gradient", x) for g, x in zip(gradients, (q, k, v), strict=True))
    outputs = dict(zip(("q_grad", "k_grad", "v_grad"), gradients, strict=True))
    native.call("dso_train_attention_backward", C.byref(call), **outputs)
    return gradients[0], gradients[1], gradients[2]


@_backward.register_fake
def _backward_fake(
    o_grad: Any, q: Any, k: Any, v: Any, o: Any, state: Any, begin: Any, end: Any, scale: float, window: int
) -> Any:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx: Any, inputs: Any, output: Any) -> None:
    q, k, v, begin, end, ctx.scale, ctx.window = inputs
    ctx.save_for_backward(q, k, v, *output, begin, end)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, o_grad: torch.Tensor | None, _: Any) -> Any:
    none = (None,) * 4  # begin, end, scale, window
    if o_grad is None:
        return None, None, None, *none
    return *_backward(o_grad, *ctx.saved_tensors, ctx.scale, ctx.window), *none


_forward.register_autograd(_gradients, setup_context=_save)


def _dense_heads(x: torch.Tensor) -> torch.Tensor:
    """x with contiguous head vectors, as the kernels require; other strides are arbitrary."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _cover(begin: torch.Tensor, end: torch.Tensor, q: torch.Tensor) -> bool:
    """Whether every token belongs to a sequence. The kernels do not write the rows of other tokens."""
    return int((end - begin).sum()) == q.shape[0] * q.shape[1]


def _heads(x: torch.Tensor, name: str, like: torch.Tensor) -> TrainHeads:
    """The native descriptor of x, which must have the dtype and shape of `like`."""
    return TrainHeads(strided(x, name, like.dtype, tuple(like.shape)), *x.stride()[:3])


def _call(q: Any, k: Any, v: Any, o: Any, state: Any, begin: Any, end: Any, scale: float, window: int) -> TrainAttention:
    """The native arguments. The caller keeps the tensors alive; `begin` and `end` must be contiguous."""
    rows, tokens, heads, width = q.shape
    count = len(begin) if q.numel() else 0
    bounds = (address(t, name, torch.int64, tuple(begin.shape)) for t, name in ((begin, "begin"), (end, "end")))
    places = (_heads(t, name, t) for t, name in ((q, "q"), (k, "k"), (v, "v"), (o, "o")))
    return TrainAttention(
        native.type_of(q), heads, k.shape[2], width, v.shape[3], scale, window, rows, tokens, count, *bounds, *places,
        address(state, "state", torch.float32, (2, heads, rows * tokens)),
    )  # fmt: skip
