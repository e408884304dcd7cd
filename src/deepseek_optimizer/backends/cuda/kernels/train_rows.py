"""Norms, SwiGLU and RoPE of training, forward and backward. Computed in fp32 and rounded once, to the inputs' dtype.

Rows of a program do not depend on the card, so that gradients have the same bits everywhere.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .precision import nearest_bf16

_PARTS = 256  # programs of a norm's backward pass, and rows of partial sums of the weight's gradient
_ELEMENTS = 1024  # of a program of SwiGLU
_HEADS = 16  # of a program of RoPE, at most


@triton.jit
def rounded(x, place):
    """float32 as the dtype that `place` points to, to the nearest."""
    if place.dtype.element_ty == tl.bfloat16:
        return nearest_bf16(x)
    else:
        return x


@triton.jit
def train_rms_norm(x, weight, y, rstd, width, eps, BLOCK: tl.constexpr):
    """y = x / sqrt(mean(x^2) + eps) * weight, and the factor of each row. Grid (rows).

    Args:
        x, weight, y: [rows, width], [width] and [rows, width], contiguous, bf16 or fp32.
        rstd: float32 [rows].
        BLOCK: a power of two >= width.
    """
    row, column = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    inside = column < width
    value = tl.load(x + row * width + column, mask=inside, other=0.0).to(tl.float32)
    root = tl.div_rn(1.0, tl.sqrt_rn(tl.sum(value * value, 0) / width + eps))
    factor = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(rstd + row, root)
    tl.store(y + row * width + column, rounded(value * root * factor, y), mask=inside)


@triton.jit
def train_rms_norm_backward(dy, x, weight, rstd, dx, parts, rows, width, per_part, WEIGHTED: tl.constexpr, BLOCK: tl.constexpr):
    """The gradient of x, and that of the weight summed over the rows of a part. Grid (parts).

    Args:
        dy, x, weight, rstd, dx: as in `train_rms_norm`.
        parts: float32 [parts, width], written if WEIGHTED.
        per_part: rows of a part.
    """
    part, column = tl.program_id(0), tl.arange(0, BLOCK)
    inside = column < width
    factor = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for i in range(per_part):
        row = (part * per_part + i).to(tl.int64)
        known = column < tl.where(row < rows, width, 0)
        root = tl.load(rstd + tl.minimum(row, rows - 1))
        normed = tl.load(x + row * width + column, mask=known, other=0.0).to(tl.float32) * root
        upstream = tl.load(dy + row * width + column, mask=known, other=0.0).to(tl.float32)
        scaled = upstream * factor
        mean = tl.sum(scaled * normed, 0) / width
        tl.store(dx + row * width + column, rounded((scaled - normed * mean) * root, dx), mask=known)
        if WEIGHTED:
            total += upstream * normed
    if WEIGHTED:
        tl.store(parts + part.to(tl.int64) * width + column, total, mask=inside)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """y of x [T, n], contiguous, and the factors of rows, float32 [T]."""
    y, rstd = torch.empty_like(x), torch.empty(len(x), dtype=torch.float32, device=x.device)
    if x.numel():
        block = triton.next_power_of_2(x.shape[1])
        train_rms_norm[(len(x),)](x, weight, y, rstd, x.shape[1], eps, BLOCK=block, num_warps=_warps(block))
    return y, rstd


def rms_norm_backward(
    dy: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, rstd: torch.Tensor, needs_weight: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of x [T, n] and, in float32, of the weight (zeros if it is not needed); all contiguous."""
    dx, (rows, width) = torch.empty_like(x), x.shape
    per_part = max(1, -(-rows // _PARTS))
    parts = torch.empty(-(-rows // per_part) if needs_weight else 0, width, dtype=torch.float32, device=x.device)
    if x.numel():
        block = triton.next_power_of_2(width)
        train_rms_norm_backward[(triton.cdiv(rows, per_part),)](
            dy, x, weight, rstd, dx, parts if needs_weight else rstd, rows, width, per_part, WEIGHTED=needs_weight, BLOCK=block,
            num_warps=_warps(block),
        )  # fmt: skip
    return dx, parts.sum(0)


@triton.jit
def train_swiglu(gate, up, out, count, BLOCK: tl.constexpr):
    """out = silu(gate) * up. Grid (blocks of elements); all contiguous [count], bf16 or fp32."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < count
    g = tl.load(gate + place, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + place, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + place, rounded(tl.div_rn(g, 1.0 + tl.exp(-g)) * u, out), mask=inside)


@triton.jit
def train_swiglu_backward(gate, up, dh, dgate, dup, count, BLOCK: tl.constexpr):
    """Gradients of gate and up. Grid and tensors as in `train_swiglu`."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < count
    g = tl.load(gate + place, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + place, mask=inside, other=0.0).to(tl.float32)
    d = tl.load(dh + place, mask=inside, other=0.0).to(tl.float32)
    share = tl.div_rn(1.0, 1.0 + tl.exp(-g))
    # g (1 - share) is 0 where share is 1, and share where g is -inf: products with infinities are not formed
    silu = tl.where(share > 0, g * share, 0.0)
    slope = share + tl.where(share > 0, silu * (1.0 - share), 0.0)
    slope, silu = tl.where(g == g, slope, g), tl.where(g == g, silu, g)
    tl.store(dup + place, rounded(d * silu, dup), mask=inside)
    tl.store(dgate + place, rounded(d * u * slope, dgate), mask=inside)


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up of contiguous tensors of one shape and dtype."""
    out = torch.empty_like(gate)
    if gate.numel():
        grid = (triton.cdiv(gate.numel(), _ELEMENTS),)
        train_swiglu[grid](gate, up, out, gate.numel(), BLOCK=_ELEMENTS, num_warps=4)
    return out


def swiglu_backward(gate: torch.Tensor, up: torch.Tensor, dh: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of gate and up; all contiguous, of one shape and dtype."""
    dgate, dup = torch.empty_like(gate), torch.empty_like(up)
    if gate.numel():
        grid = (triton.cdiv(gate.numel(), _ELEMENTS),)
        train_swiglu_backward[grid](gate, up, dh, dgate, dup, gate.numel(), BLOCK=_ELEMENTS, num_warps=4)
    return dgate, dup


@triton.jit
def train_rope(
    x, cos, sin, out, heads, x_batch, x_head, x_token, out_batch, out_head, out_token, angle_batch, angle_token,
    WIDTH: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr, BACKWARD: tl.constexpr, HEADS: tl.constexpr,
    PAIRS: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    """Rotates the heads of a token, or with BACKWARD applies the transpose. Grid (tokens, sequences, blocks of heads).

    Args:
        x, out: [batch, heads, tokens, WIDTH] of these strides, in elements; 1 in the last dimension. bf16 or fp32.
        cos, sin: [batch or 1, tokens, 2 * HALF].
        INTERLEAVED: pairs of the forward pass' input are (2i, 2i + 1), not (i, i + HALF); those of its output never are.
        PAIRS, REST: powers of two, >= HALF and >= WIDTH - 2 * HALF (0: nothing is copied).
    """
    token, sequence = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    head = (tl.program_id(2) * HEADS + tl.arange(0, HEADS))[:, None]
    pair = tl.arange(0, PAIRS)[None, :]
    source = x + sequence * x_batch + token * x_token + head.to(tl.int64) * x_head
    target = out + sequence * out_batch + token * out_token + head.to(tl.int64) * out_head
    inside, angles = (head < heads) & (pair < HALF), sequence * angle_batch + token * angle_token
    c0 = tl.load(cos + angles + pair, mask=pair < HALF, other=0.0).to(tl.float32)
    c1 = tl.load(cos + angles + pair + HALF, mask=pair < HALF, other=0.0).to(tl.float32)
    s0 = tl.load(sin + angles + pair, mask=pair < HALF, other=0.0).to(tl.float32)
    s1 = tl.load(sin + angles + pair + HALF, mask=pair < HALF, other=0.0).to(tl.float32)
    first, second = pair, pair + HALF  # of the input of the forward pass
    if INTERLEAVED:
        first, second = 2 * pair, 2 * pair + 1
    if BACKWARD:
        left = tl.load(source + pair, mask=inside, other=0.0).to(tl.float32)
        right = tl.load(source + pair + HALF, mask=inside, other=0.0).to(tl.float32)
        tl.store(target + first, rounded(left * c0 + right * s1, out), mask=inside)
        tl.store(target + second, rounded(right * c1 - left * s0, out), mask=inside)
    else:
        a = tl.load(source + first, mask=inside, other=0.0).to(tl.float32)
        b = tl.load(source + second, mask=inside, other=0.0).to(tl.float32)
        tl.store(target + pair, rounded(a * c0 - b * s0, out), mask=inside)
        tl.store(target + pair + HALF, rounded(b * c1 + a * s1, out), mask=inside)
    if REST > 0:
        place = 2 * HALF + tl.arange(0, REST)[None, :]
        kept = (head < heads) & (place < WIDTH)
        tl.store(target + place, tl.load(source + place, mask=kept), mask=kept)


def rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool, backward: bool, out: torch.Tensor) -> None:
    """Writes to `out`. x and out [B, H, S, D] with a last stride of 1; cos and sin [B or 1, S, R], contiguous, of x's dtype."""
    batch, heads, tokens, width = x.shape
    if not x.numel():
        return
    half, block = cos.shape[2] // 2, min(_HEADS, triton.next_power_of_2(heads))
    rest = width - 2 * half
    train_rope[(tokens, batch, triton.cdiv(heads, block))](
        x, cos, sin, out, heads, x.stride(0), x.stride(1), x.stride(2), out.stride(0), out.stride(1), out.stride(2),
        0 if len(cos) == 1 else cos.stride(0), cos.stride(1), WIDTH=width, HALF=half, INTERLEAVED=interleaved,
        BACKWARD=backward, HEADS=block, PAIRS=triton.next_power_of_2(max(1, half)),
        REST=triton.next_power_of_2(rest) if rest else 0, num_warps=4,
    )  # fmt: skip


def _warps(block: int) -> int:
    return min(16, max(1, block // 512))
