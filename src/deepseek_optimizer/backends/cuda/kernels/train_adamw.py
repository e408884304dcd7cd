"""A step of AdamW on one tensor, in one pass, with the bits of `train/ops/adamw.py`; and the sums of gradients' squares.

Additions and products must not be fused, so the kernel is compiled without fusion, and divides and takes roots with rounding to
the nearest.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_CODED = 256  # elements that share the scales of 8-bit moments
_ROWS = 4  # of such blocks in a program
_SQUARES = 4096  # elements of a program of `train_squares`
_INTEGERS = tl.constexpr(12582912.0)  # 1.5 * 2^23: a sum with it is rounded to an integer, half to even


@triton.jit
def random_words(index, first, second):
    """32 random bits of each element: `random_bits.random_bits`. uint32; keys are int32."""
    x = index.to(tl.uint32) + first.to(tl.uint32, bitcast=True)
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = x + second.to(tl.uint32, bitcast=True)
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def stochastic(x, bits):
    """float32 rounded to bf16 by 16 random bits, as float32 whose lower half is 0; NaN stays one. uint32 bits below 2^16."""
    upper = ((x.to(tl.uint32, bitcast=True) + bits) >> 16) << 16
    return tl.where(x == x, upper.to(tl.float32, bitcast=True), float("nan"))


@triton.jit
def inverse(scale):
    """1 / scale; 0 where that overflows."""
    result = tl.div_rn(1.0, scale)
    return tl.where(result <= 3.4028234663852886e38, result, 0.0)


@triton.jit(do_not_specialize=["key0", "key1", "key2", "key3"])
def train_adamw(
    parameter, low, gradient, m_at, v_at, m_scales, v_scales, count, gradient_scale, beta1, rest1, beta2, rest2, bias2, eps,
    step, decay, key0, key1, key2, key3, MASTER: tl.constexpr, CODED: tl.constexpr, DRAWN: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid (blocks of ROWS * BLOCK elements); all tensors contiguous [count], but scales [ceil(count / BLOCK)].

    Args:
        parameter: float32, or bf16 with MASTER "split" and "stochastic".
        low: int16, for "split".
        gradient: float32 or bf16.
        m_at, v_at: float32; bf16 with DRAWN; int8 and uint8 with CODED, and then float32 scales.
        key0, key1, key2, key3: int32, the bits of the keys of `random_bits.keys`.
    """
    block = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    index = block[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    inside, own = index < count, block * BLOCK < count
    w = tl.load(parameter + index, mask=inside, other=0.0).to(tl.float32)
    if MASTER == "split":
        rest = tl.load(low + index, mask=inside, other=0).to(tl.int32)
        w = (w.to(tl.int32, bitcast=True) + rest).to(tl.float32, bitcast=True)
    g = tl.load(gradient + index, mask=inside, other=0.0).to(tl.float32) * gradient_scale
    m = tl.load(m_at + index, mask=inside, other=0).to(tl.float32)
    v = tl.load(v_at + index, mask=inside, other=0).to(tl.float32)
    if CODED:
        y = tl.div_rn(m, tl.full(m.shape, 127.0, tl.float32))
        root = tl.div_rn(v, tl.full(v.shape, 255.0, tl.float32)) * tl.load(v_scales + block, mask=own, other=0.0)[:, None]
        m = tl.div_rn(y, 2.0 - tl.abs(y)) * tl.load(m_scales + block, mask=own, other=0.0)[:, None]
        v = root * root
    m = m * beta1 + g * rest1
    v = v * beta2 + (g * rest2) * g
    root = tl.sqrt_rn(v)
    w = w - (w * decay + tl.div_rn(m * step, root * bias2 + eps))
    if CODED:
        m_scale, v_scale = tl.max(tl.abs(m), 1), tl.max(root, 1)
        tl.store(m_scales + block, m_scale, mask=own)
        tl.store(v_scales + block, v_scale, mask=own)
        y = m * inverse(m_scale)[:, None]
        soft = tl.div_rn(y + y, 1.0 + tl.abs(y))
        code = (soft * 127.0 + _INTEGERS) - _INTEGERS
        tl.store(m_at + index, code.to(tl.int32).to(tl.int8), mask=inside)
        code = (root * inverse(v_scale)[:, None] * 255.0 + _INTEGERS) - _INTEGERS
        code = tl.where(root > 0, tl.maximum(code, 1.0), code)
        tl.store(v_at + index, code.to(tl.int32).to(tl.uint8), mask=inside)
    elif DRAWN:
        bits = random_words(index, key0, key1)
        tl.store(m_at + index, stochastic(m, bits & 0xFFFF).to(tl.bfloat16), mask=inside)
        tl.store(v_at + index, stochastic(v, bits >> 16).to(tl.bfloat16), mask=inside)
    else:
        tl.store(m_at + index, m, mask=inside)
        tl.store(v_at + index, v, mask=inside)
    if MASTER == "split":
        bits = tl.where(w == w, w, float("nan")).to(tl.int32, bitcast=True)
        upper = (bits + 0x8000) & -65536
        tl.store(low + index, (bits - upper).to(tl.int16), mask=inside)
        tl.store(parameter + index, upper.to(tl.float32, bitcast=True).to(tl.bfloat16), mask=inside)
    elif MASTER == "stochastic":
        bits = random_words(index, key2, key3)
        tl.store(parameter + index, stochastic(w, bits & 0xFFFF).to(tl.bfloat16), mask=inside)
    else:
        tl.store(parameter + index, w, mask=inside)


def adamw(
    parameter: torch.Tensor,
    low: torch.Tensor | None,
    gradient: torch.Tensor,
    moments: tuple[torch.Tensor, torch.Tensor],
    scales: tuple[torch.Tensor, torch.Tensor] | None,
    rates: tuple[float, ...],
    keys: tuple[int, int, int, int],
    master: str,
) -> None:
    """One update in place; all tensors contiguous.

    Args:
        parameter, low, gradient: see `train_adamw`.
        moments: m and v.
        scales: of 8-bit moments.
        rates: gradient_scale, beta1, rest1, beta2, rest2, bias2, eps, step, decay.
        keys: uint32 each.
        master: "none", "split" or "stochastic".
    """
    count = parameter.numel()
    if not count:
        return
    m, v = moments
    m_scale, v_scale = scales or (m, v)
    train_adamw[(triton.cdiv(count, _ROWS * _CODED),)](
        parameter, parameter if low is None else low, gradient, m, v, m_scale, v_scale, count, *rates, *map(_signed, keys),
        MASTER=master, CODED=scales is not None, DRAWN=m.dtype == torch.bfloat16, ROWS=_ROWS, BLOCK=_CODED, num_warps=4,
        enable_fp_fusion=False,
    )  # fmt: skip


@triton.jit
def train_squares(x, sums, count, BLOCK: tl.constexpr):
    """The sum of squares and the number of elements that are not finite, float64 [programs, 2]. Grid (blocks)."""
    program = tl.program_id(0).to(tl.int64)
    place = program * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + place, mask=place < count, other=0.0).to(tl.float32)
    wide = value.to(tl.float64)
    tl.store(sums + 2 * program, tl.sum(wide * wide, 0))
    bad = (tl.abs(value) <= 3.4028234663852886e38) == 0
    tl.store(sums + 2 * program + 1, tl.sum(bad.to(tl.int32), 0).to(tl.float64))


def squares(x: torch.Tensor) -> torch.Tensor:
    """Sum of the squares of a contiguous tensor, and how many elements are not finite: float64 [2] on its device."""
    programs = triton.cdiv(x.numel(), _SQUARES)
    sums = torch.empty(programs, 2, dtype=torch.float64, device=x.device)
    if programs:
        train_squares[(programs,)](x, sums, x.numel(), BLOCK=_SQUARES, num_warps=4)
    return sums.sum(0)


def _signed(word: int) -> int:
    """The int32 with the bits of a uint32."""
    return word - (1 << 32) if word >= 1 << 31 else word
