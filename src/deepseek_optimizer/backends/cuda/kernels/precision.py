"""How products of tiles are computed: fp32 exactly, or bf16 with fp32 sums on tensor cores.

Triton's interpreter truncates when it casts to bf16, and its products of bf16 tiles are wrong. `EMULATED` is true there: values
are then rounded to the nearest bf16 (ties to even) as bits, and multiplied as fp32. This gives what tensor cores give, up to
the order of sums, because a product of two bf16 values is exact in fp32.
"""

from __future__ import annotations

import triton
import triton.language as tl

EMULATED = tl.constexpr(bool(triton.knobs.runtime.interpret))


@triton.jit
def nearest_bf16(x):
    """float32 -> the nearest bf16 values, as bf16; in the interpreter as float32."""
    if EMULATED:
        bits = x.to(tl.float32).to(tl.int32, bitcast=True)
        bits += 0x7FFF + ((bits >> 16) & 1)
        return (bits & -65536).to(tl.float32, bitcast=True)
    else:
        return x.to(tl.bfloat16)


@triton.jit
def add_product(total, a, b, NARROW: tl.constexpr):
    """total [M, N] + a [M, K] @ b [K, N], sums in float32. NARROW: operands are rounded to bf16; otherwise they are float32."""
    if NARROW:
        return tl.dot(nearest_bf16(a), nearest_bf16(b), total, input_precision="ieee")
    else:
        return tl.dot(a, b, total, input_precision="ieee")
