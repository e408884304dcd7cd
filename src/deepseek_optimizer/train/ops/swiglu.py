"""h = silu(gate) * up (Shazeer, "GLU Variants Improve Transformer", arXiv 2002.05202), computed in fp32 and rounded once."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from . import native, triton_ops


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """gate, up [..., n] -> [..., n]. Raises ValueError if their shapes differ."""
    if gate.shape != up.shape:
        raise ValueError(f"swiglu: gate is {list(gate.shape)}, up {list(up.shape)}; the shapes must be equal")
    if gate.dtype == up.dtype and triton_ops.usable(gate, up):
        return triton_ops.swiglu(gate, up)
    if gate.dim() == 0 or gate.dtype != up.dtype or not native.usable(gate, up):
        return swiglu_reference(gate, up)
    return _swiglu(gate, up)


def limited(gate: torch.Tensor, up: torch.Tensor, limit: float | None) -> tuple[torch.Tensor, torch.Tensor]:
    """min(gate, limit) and up within [-limit, limit], as DeepSeek-V4 limits what enters `swiglu`; unchanged without a limit."""
    return (gate, up) if limit is None else (gate.clamp(max=limit), up.clamp(min=-limit, max=limit))


def swiglu_reference(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """`swiglu` in plain torch."""
    dtype = torch.promote_types(gate.dtype, up.dtype)
    wide = torch.promote_types(dtype, torch.float32)
    return (F.silu(gate.to(wide)) * up.to(wide)).to(dtype)


# ---- registration as torch ops


@torch.library.custom_op("dso::train_swiglu", mutates_args=(), device_types="cpu")
def _swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    h = native.new(gate.shape, gate)
    g, u, m = native.rows(gate), native.rows(up), native.matrix
    native.call("dso_train_swiglu", *g.shape, m(g, "gate"), m(u, "up", g.shape), m(native.rows(h), "h", g.shape), h=h)
    return h


@torch.library.custom_op("dso::train_swiglu_backward", mutates_args=(), device_types="cpu")
def _backward(gate: torch.Tensor, up: torch.Tensor, dh: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    dgate, dup = (native.new(gate.shape, gate) for _ in range(2))
    g, u, d, m = native.rows(gate), native.rows(up), native.rows(dh.to(gate.dtype)), native.matrix
    operands = m(g, "gate"), m(u, "up", g.shape), m(d, "dh", g.shape)
    outputs = m(native.rows(dgate), "dgate", g.shape), m(native.rows(dup), "dup", g.shape)
    native.call("dso_train_swiglu_backward", *g.shape, *operands, *outputs, None, dgate=dgate, dup=dup)
    return dgate, dup


@_swiglu.register_fake
def _(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)


@_backward.register_fake
def _(gate: torch.Tensor, up: torch.Tensor, dh: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty(gate.shape, dtype=gate.dtype, device=gate.device), torch.empty(
        gate.shape, dtype=up.dtype, device=gate.device
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _gradients(ctx: Any, dh: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    result: tuple[torch.Tensor, torch.Tensor] = _backward(*ctx.saved_tensors, dh)
    return result


_swiglu.register_autograd(_gradients, setup_context=_save)
