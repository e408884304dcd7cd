"""Functions of single elements that several kernels share."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def tanh(x):
    """tanh(x): 2 sigmoid(2 x) - 1, which is off by at most 1.2e-7."""
    return 2.0 * tl.sigmoid(2.0 * x) - 1.0


@triton.jit
def capped(x, cap):
    """cap * tanh(x / cap); x if cap is 0."""
    if cap > 0:
        x = cap * tanh(x / cap)
    return x


@triton.jit
def gelu(x):
    """See op `gelu`: x / 2 * (1 + tanh(y)) is x * sigmoid(2 y), without the cancellation for negative y."""
    return x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))


@triton.jit
def gelu_erf(x):
    """See op `gelu_erf`."""
    return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))


@triton.jit
def gated(gate, up, GATE: tl.constexpr):
    """float32 gate and up, joined as `gates.Gate` says."""
    if GATE.kind == "silu":
        return gate * tl.sigmoid(gate) * up
    elif GATE.kind == "gelu":
        return gelu(gate) * up
    else:
        tl.static_assert(GATE.kind == "clamped")
        gate = tl.where(gate > GATE.limit, GATE.limit, gate)  # NaN stays
        up = tl.where(up > GATE.limit, GATE.limit, tl.where(up < -GATE.limit, -GATE.limit, up))
        if GATE.raised:
            up += 1.0
        return up * gate * tl.sigmoid(GATE.alpha * gate)
