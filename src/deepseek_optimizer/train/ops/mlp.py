"""y = down(silu(gate(x)) * up(x)) as one op (SwiGLU: Shazeer, arXiv 2002.05202). It saves x, gate(x) and up(x); the input of
`down` is recomputed in the backward pass, in the same loop as the gradients of gate and up."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from . import native, triton_ops
from .linear import check_columns, gradient_place, rows_of, weight_gradient
from .product import product
from .swiglu import swiglu


def mlp(
    x: torch.Tensor, gate_w: torch.Tensor, up_w: torch.Tensor, down_w: torch.Tensor, *, save_all: bool = False
) -> torch.Tensor:
    """x [..., H], gate_w and up_w [I, H], down_w [O, I], all of one dtype -> [..., O]. Autocast and `main_grad` work as in
    `linear`.

    Args:
        save_all: also save the input of `down` [T, I] instead of recomputing it; the results are bitwise equal.

    Raises:
        ValueError: shapes do not match.
    """
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, gate_w, up_w, down_w = (t.to(dtype) for t in (x, gate_w, up_w, down_w))
    one_dtype = x.dtype == gate_w.dtype == up_w.dtype == down_w.dtype
    if one_dtype and triton_ops.usable(x, gate_w, up_w, down_w):
        return F.linear(swiglu(F.linear(x, gate_w), F.linear(x, up_w)), down_w)
    if not (one_dtype and native.usable(x, gate_w, up_w, down_w)):
        return mlp_reference(x, gate_w, up_w, down_w)
    check_columns("mlp", x, gate_w)
    if gate_w.shape != up_w.shape or down_w.dim() != 2 or down_w.shape[1] != gate_w.shape[0]:
        shapes = f"{list(gate_w.shape)}, {list(up_w.shape)} and {list(down_w.shape)}"
        raise ValueError(f"mlp: weights must be [I, H], [I, H] and [O, I], got {shapes}")
    result: torch.Tensor = _Mlp.apply(x, gate_w, up_w, down_w, save_all)
    return result


def mlp_reference(x: torch.Tensor, gate_w: torch.Tensor, up_w: torch.Tensor, down_w: torch.Tensor) -> torch.Tensor:
    """`mlp` in plain torch."""
    return F.linear(F.silu(F.linear(x, gate_w)) * F.linear(x, up_w), down_w)


class _Mlp(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, gate_w: torch.Tensor, up_w: torch.Tensor, down_w: torch.Tensor, save_all: bool
    ) -> torch.Tensor:
        rows = rows_of(x)
        gate, up = product("nt", rows, gate_w), product("nt", rows, up_w)
        h = swiglu(gate, up)
        ctx.save_for_backward(x, gate, up, gate_w, up_w, down_w, h if save_all else None)
        ctx.weights = tuple(gradient_place(w) for w in (gate_w, up_w, down_w))
        return product("nt", h, down_w).view(*x.shape[:-1], down_w.shape[0])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> Any:
        x, gate, up, gate_w, up_w, down_w, saved = ctx.saved_tensors
        needs_x, needs_gate, needs_up, needs_down, _ = ctx.needs_input_grad
        dy, rows = rows_of(dy), rows_of(x)
        dh = product("nn", dy, down_w)
        dgate, dup = _gate_gradients(gate, up, dh, saved is None)
        h = dh if saved is None else saved
        dx = product("nn", dgate, gate_w) if needs_x else None
        return (
            None if dx is None else product("nn", dup, up_w, out=dx, add=True).view(x.shape),
            weight_gradient(ctx.weights[0], dgate, rows) if needs_gate else None,
            weight_gradient(ctx.weights[1], dup, rows) if needs_up else None,
            weight_gradient(ctx.weights[2], dy, h) if needs_down else None,
            None,
        )


def _gate_gradients(
    gate: torch.Tensor, up: torch.Tensor, dh: torch.Tensor, recompute: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of gate and up. These two are not overwritten, since backward may run twice.

    Args:
        recompute: overwrite dh with h = silu(gate) * up.
    """
    dgate, dup = native.new(gate.shape, gate), native.new(up.shape, up)
    named = (("gate", gate), ("up", up), ("dh", dh), ("dgate", dgate), ("dup", dup))
    g, u, d, to_gate, to_up = (native.matrix(t, name, gate.shape) for name, t in named)
    native.call(
        "dso_train_swiglu_backward", *gate.shape, g, u, d, to_gate, to_up, d if recompute else None, dgate=dgate, dup=dup
    )
    return dgate, dup
