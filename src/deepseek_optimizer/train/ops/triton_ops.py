"""The ops of training by Triton's kernels, for tensors on a CUDA device. Not run on a card yet.

The kernels are those of `backends/cuda/kernels/train_*.py`, which are imported at the first use: that takes seconds. Each op
asks `usable` and `native.usable`; if both deny, it is plain torch.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from ...backends.cuda import unavailable_reason
from ...backends.cuda.device import launching_on
from .moments import Moments

_DTYPES = (torch.float32, torch.bfloat16)


@functools.cache
def missing(device: torch.device) -> str | None:
    """Why the kernels cannot run on a CUDA device, with the remedy; None: they can."""
    return unavailable_reason(device)


def usable(*tensors: torch.Tensor | None) -> bool:
    """Whether the kernels support these tensors: all on a CUDA device, in bf16 or fp32."""
    given = [t for t in tensors if t is not None]
    return all(t.device.type == "cuda" and t.dtype in _DTYPES for t in given) and missing(given[0].device) is None


def note_for(device: torch.device) -> str | None:
    """A sentence of the training report about a model on this device; None: it is on the CPU."""
    if device.type != "cuda":
        return None
    if (reason := missing(device)) is not None:
        return f"norms, SwiGLU, RoPE, the loss and AdamW are PyTorch's own operations on {device}: {reason}"
    return f"norms, SwiGLU, RoPE, the loss and AdamW are Triton's kernels on {device}; products and attention are PyTorch's"


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """As `rms_norm.rms_norm_of_dtype`: [..., n] of x's dtype."""
    result: torch.Tensor = _RmsNorm.apply(x, weight, eps)
    return result


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """As `swiglu.swiglu`, of one dtype."""
    result: torch.Tensor = _Swiglu.apply(gate, up)
    return result


def rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool) -> torch.Tensor:
    """As `rope.rope`; cos and sin are of x's dtype and have no gradients."""
    result: torch.Tensor = _Rope.apply(x, cos, sin, interleaved)
    return result


def cross_entropy_(
    logits: torch.Tensor, labels: torch.Tensor, factor: float | None, dtype: torch.dtype
) -> tuple[float, torch.Tensor]:
    """As `cross_entropy.cross_entropy_`, of contiguous fp32 logits."""
    from ...backends.cuda.kernels import train_loss

    with launching_on(logits.device):
        losses, gradient = train_loss.cross_entropy(logits, labels, factor, dtype)
    return float(losses.sum(dtype=torch.float64)), gradient


def adamw(
    parameter: torch.Tensor,
    low: torch.Tensor | None,
    gradient: torch.Tensor,
    moments: Moments,
    rates: tuple[float, ...],
    key: tuple[int, int, int, int],
    master: str,
) -> None:
    """As `adamw.adamw_reference`, with the same bits; all tensors are contiguous.

    Args:
        rates: the fields of `adamw.Rates`, in their order.
        parameter, low, gradient, moments, key, master: the fields of `adamw.Update`.
    """
    from ...backends.cuda.kernels import train_adamw

    m_scale, v_scale = moments.m_scale, moments.v_scale
    scales = None if m_scale is None or v_scale is None else (m_scale, v_scale)
    with launching_on(parameter.device):
        train_adamw.adamw(parameter.detach(), low, gradient.detach(), (moments.m, moments.v), scales, rates, key, master)
    torch.autograd.graph.increment_version(parameter)  # so that a later backward through the old weights raises


def squares(tensors: Sequence[torch.Tensor]) -> tuple[list[float], list[int]]:
    """As `adamw.squares`, waiting for the device once."""
    from ...backends.cuda.kernels import train_adamw

    found = []
    for tensor in tensors:
        with launching_on(tensor.device):
            found.append(train_adamw.squares(tensor.detach().contiguous()).to(tensors[0].device))
    pairs = torch.stack(found).tolist()
    return [total for total, _ in pairs], [int(count) for _, count in pairs]


def _rows(x: torch.Tensor) -> torch.Tensor:
    return x.reshape(-1, x.shape[-1]).contiguous()


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        from ...backends.cuda.kernels import train_rows

        with launching_on(x.device):
            y, rstd = train_rows.rms_norm(_rows(x), weight.contiguous(), eps)
        ctx.save_for_backward(x, weight, rstd)
        return y.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        from ...backends.cuda.kernels import train_rows

        x, weight, rstd = ctx.saved_tensors
        needs_weight = ctx.needs_input_grad[1]
        with launching_on(x.device):
            dy, scale = _rows(grads[0].to(x.dtype)), weight.contiguous()
            dx, dw = train_rows.rms_norm_backward(dy, _rows(x), scale, rstd, needs_weight)
        return dx.view(x.shape), dw.to(weight.dtype) if needs_weight else None, None


class _Swiglu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        from ...backends.cuda.kernels import train_rows

        ctx.save_for_backward(gate, up)
        with launching_on(gate.device):
            return train_rows.swiglu(gate.contiguous(), up.contiguous())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        from ...backends.cuda.kernels import train_rows

        gate, up = ctx.saved_tensors
        with launching_on(gate.device):
            return train_rows.swiglu_backward(gate.contiguous(), up.contiguous(), grads[0].to(gate.dtype).contiguous())


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool) -> torch.Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.interleaved = interleaved
        return _rotated(x, cos, sin, interleaved, backward=False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        cos, sin = ctx.saved_tensors
        return _rotated(grads[0], cos, sin, ctx.interleaved, backward=True), None, None, None


def _rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool, backward: bool) -> torch.Tensor:
    """A new tensor in x's order in memory."""
    from ...backends.cuda.kernels import train_rows

    x = x if x.stride(-1) == 1 else x.contiguous()
    if x.stride(1) < x.stride(2):  # a transposed view of [B, S, H, D]
        out = torch.empty_like(x.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2)
    else:
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
    with launching_on(x.device):
        train_rows.rope(x, cos.contiguous(), sin.contiguous(), interleaved, backward, out)
    return out
