"""Causal attention over packed sequences, with its gradients: no score matrix, and of the softmax two numbers a row are kept.

    o = softmax(scale q k^T) v, where token t of a sequence sees its tokens (t - window, t]

FlashAttention-2 (Dao 2023, arXiv 2307.08691), algorithms 1 and 2. The backward makes the weights anew. Every sum has one order,
so results and gradients are the same to the bit whatever the number of threads.
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
    """q [T, H, Dk], k [T, Hkv, Dk], v [T, Hkv, Dv] -> [T, H, Dv], all of one dtype; query head h reads kv head h // (H / Hkv).

    Args:
        cu_seqlens: int [n + 1], ascending from 0 to T: sequence i is tokens [cu_seqlens[i], cu_seqlens[i + 1]).
        used: int [n], how many tokens a sequence has; the others of its place are padding, whose rows and gradients are zero.
            None: all.
        window: tokens that a token sees, itself included; 0: all before it.

    Raises:
        ValueError: a shape or a bound does not fit.
    """
    if q.dim() != 3 or k.dim() != 3 or v.dim() != 3:
        raise ValueError(f"attention: q, k, v are [T, heads, width], not {list(q.shape)}, {list(k.shape)}, {list(v.shape)}")
    bounds = cu_seqlens.to("cpu", torch.int64)
    if bounds.dim() != 1 or len(bounds) < 1 or int(bounds[0]) != 0 or int(bounds[-1]) != q.shape[0]:
        raise ValueError(f"attention: cu_seqlens must go from 0 to {q.shape[0]}, the number of tokens")
    begin, end = bounds[:-1].contiguous(), bounds[1:].contiguous()
    if used is not None:
        if used.shape != begin.shape or bool((used.cpu() > end - begin).any()) or bool((used < 0).any()):
            raise ValueError(f"attention: used must have {len(begin)} numbers of tokens, none more than its sequence has")
        end = begin + used.to("cpu", torch.int64)
    return packed_attention(q[None], k[None], v[None], begin, end, scale, window)[0]


def packed_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, begin: torch.Tensor, end: torch.Tensor, scale: float, window: int = 0
) -> torch.Tensor:
    """The same for rows of tokens: q [B, S, H, Dk], k [B, S, Hkv, Dk], v [B, S, Hkv, Dv], views of any stride -> [B, S, H, Dv].

    Args:
        begin, end: int64 [n] on the CPU: sequence i is tokens [begin[i], end[i]), counted through all B * S; ascending, and
            none crosses the end of a row. What lies between them is padding, whose rows and gradients are zero.

    Raises:
        ValueError: as `attention`.
    """
    if torch.is_autocast_enabled(q.device.type):
        dtype = torch.get_autocast_dtype(q.device.type)
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    _check(q, k, v, begin, end, window)
    fits = max(q.shape[-1], v.shape[-1]) <= MAX_WIDTH and q.shape[-1] % 2 == v.shape[-1] % 2 == 0
    if not (fits and native.usable(q, k, v)):
        return packed_attention_reference(q, k, v, begin, end, scale, window)
    found: torch.Tensor = _forward(q, k, v, begin.contiguous(), end.contiguous(), scale, window)[0]
    return found


def packed_attention_reference(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, begin: torch.Tensor, end: torch.Tensor, scale: float, window: int = 0
) -> torch.Tensor:
    """As `packed_attention`, in plain torch that torch differentiates; bf16 and fp16 are computed in fp32 and rounded once."""
    group = q.shape[2] // k.shape[2]
    wide = torch.promote_types(q.dtype, torch.float32)
    query, key, value = (x.flatten(0, 1).transpose(0, 1).to(wide) for x in (q, k, v))  # [heads, B * S, width]
    pieces, at = [], 0
    for first, last in zip(begin.tolist(), end.tolist(), strict=True):
        if last == first:
            continue
        if first > at:
            pieces.append(query.new_zeros(q.shape[2], first - at, v.shape[3]))
        keys, values = (x[:, first:last].repeat_interleave(group, 0) for x in (key, value))
        t = torch.arange(last - first, device=q.device, dtype=torch.int64)
        seen = t[:, None] >= t
        if window:
            seen &= t[:, None] - t < window
        logits = (query[:, first:last] @ keys.transpose(1, 2) * scale).masked_fill(~seen, float("-inf"))
        pieces.append(logits.softmax(-1) @ values)
        at = last
    tokens = query.shape[1]
    if tokens > at or not pieces:
        pieces.append(query.new_zeros(q.shape[2], tokens - at, v.shape[3]))
    return torch.cat(pieces, 1).transpose(0, 1).unflatten(0, q.shape[:2]).to(q.dtype)


def _check(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, begin: torch.Tensor, end: torch.Tensor, window: int) -> None:
    shapes = f"q is {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}"
    if not (q.dim() == k.dim() == v.dim() == 4 and q.shape[:2] == k.shape[:2] == v.shape[:2] and k.shape[2] == v.shape[2]):
        raise ValueError(f"attention: {shapes}: rows and tokens must be equal, and k and v have as many heads")
    if (
        k.shape[2] < 1
        or q.shape[2] < 1
        or q.shape[2] % k.shape[2]
        or q.shape[3] != k.shape[3]
        or not q.shape[3]
        or not v.shape[3]
    ):
        raise ValueError(f"attention: {shapes}: q has a multiple of k's heads, and heads as wide")
    if not q.dtype == k.dtype == v.dtype or not q.dtype.is_floating_point:
        raise ValueError(f"attention: q is {q.dtype}, k {k.dtype}, v {v.dtype}: one floating dtype is needed")
    if window < 0:
        raise ValueError(f"attention: window is {window}")
    if (
        begin.dtype != torch.int64
        or end.dtype != torch.int64
        or begin.dim() != 1
        or begin.shape != end.shape
        or not begin.is_cpu
    ):
        raise ValueError("attention: begin and end are int64 tensors of one length on the CPU")
    tokens = q.shape[0] * q.shape[1]
    before = torch.cat((begin.new_zeros(1), end))
    if bool((begin < before[:-1]).any()) or bool((end < begin).any()) or int(before[-1]) > tokens:
        raise ValueError(f"attention: sequences must ascend within {tokens} tokens without sharing any")
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
    written = dict(zip(("q_grad", "k_grad", "v_grad"), gradients, strict=True))
    native.call("dso_train_attention_backward", C.byref(call), **written)
    return gradients[0], gradients[1], gradients[2]


@_backward.register_fake
def _backward_fake(
    o_grad: Any, q: Any, k: Any, v: Any, o: Any, state: Any, begin: Any, end: Any, scale: float, window: int
) -> Any:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _keep(ctx: Any, inputs: Any, output: Any) -> None:
    q, k, v, begin, end, ctx.scale, ctx.window = inputs
    ctx.save_for_backward(q, k, v, *output, begin, end)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, o_grad: torch.Tensor | None, _: Any) -> Any:
    nothing = (None,) * 4  # begin, end, scale, window
    if o_grad is None:
        return None, None, None, *nothing
    return *_backward(o_grad, *ctx.saved_tensors, ctx.scale, ctx.window), *nothing


_forward.register_autograd(_gradients, setup_context=_keep)


def _dense_heads(x: torch.Tensor) -> torch.Tensor:
    """As the kernels read it: any stride but a head's own."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _cover(begin: torch.Tensor, end: torch.Tensor, q: torch.Tensor) -> bool:
    """Whether every token is one of a sequence; what is not is never written."""
    return int((end - begin).sum()) == q.shape[0] * q.shape[1]


def _heads(x: torch.Tensor, name: str, like: torch.Tensor) -> TrainHeads:
    """x, which has the dtype and shape of `like`."""
    return TrainHeads(strided(x, name, like.dtype, tuple(like.shape)), *x.stride()[:3])


def _call(q: Any, k: Any, v: Any, o: Any, state: Any, begin: Any, end: Any, scale: float, window: int) -> TrainAttention:
    """The caller keeps the tensors alive, and `begin` and `end` are dense."""
    rows, tokens, heads, width = q.shape
    many = len(begin) if q.numel() else 0
    bounds = (address(t, name, torch.int64, tuple(begin.shape)) for t, name in ((begin, "begin"), (end, "end")))
    places = (_heads(t, name, t) for t, name in ((q, "q"), (k, "k"), (v, "v"), (o, "o")))
    return TrainAttention(
        native.type_of(q), heads, k.shape[2], width, v.shape[3], scale, window, rows, tokens, many, *bounds, *places,
        address(state, "state", torch.float32, (2, heads, rows * tokens)),
    )  # fmt: skip
