"""Codes of a byte, as int8 and fp8 caches store them: `reference/scaled_rows.py` defines both.

E4M3 is computed with integers: cards before compute capability 8.9 cannot convert it, and the interpreter's conversion does not
round.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_TO_INTEGER = tl.constexpr(12582912.0)  # 1.5 * 2^23: sums are rounded to integers, half to even


@triton.jit
def latent_keys(cache, layer, RANK: tl.constexpr):
    """Pointers to the rotated keys of a layer in blocks of a cache of codes of latents, bf16 [32, ROPE].

    Args:
        layer: where the layer begins, in bytes.
    """
    return cache.to(tl.pointer_type(tl.bfloat16), bitcast=True) + (layer + 32 * RANK) // 2


@triton.jit
def latent_scales(cache, layer, RANK: tl.constexpr, ROPE: tl.constexpr):
    """Pointers to the scales of a layer's codes, float32 [32, groups]; arguments as of `latent_keys`."""
    return cache.to(tl.pointer_type(tl.float32), bitcast=True) + (layer + 32 * (RANK + 2 * ROPE)) // 4


def kind_of(cache: torch.Tensor) -> str:
    """What the elements of a cache are, the KIND of kernels: "int8", "e4m3", or "" for floats."""
    return {torch.int8: "int8", torch.uint8: "e4m3"}.get(cache.dtype, "")


@triton.jit
def from_e4m3(code):
    """int32 -> the number that the lowest byte stands for, as float32. The bits of a float32 have the same exponent field,
    which has a bias of 127 and not of 7."""
    return (((code & 0x80) << 24) | ((code & 0x7F) << 20)).to(tl.float32, bitcast=True) * 2.0**120


@triton.jit
def to_e4m3(x):
    """float32 of magnitude <= 448 -> the code of the nearest number, half to even, as int32."""
    bits = x.to(tl.int32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    normal = ((magnitude + 0x7FFFF + ((magnitude >> 20) & 1)) >> 20) - (120 << 3)
    small = (tl.abs(x) * 512.0 + _TO_INTEGER) - _TO_INTEGER  # below 2^-6, in steps of 2^-9
    return tl.where(magnitude < (121 << 23), small.to(tl.int32), normal) | ((bits >> 24) & 0x80)


@triton.jit
def scale_of(largest, KIND: tl.constexpr):
    """The scale of a row whose largest magnitude is `largest`."""
    return tl.div_rn(largest, 127.0 if KIND == "int8" else 448.0)


@triton.jit
def codes_of(x, scale, KIND: tl.constexpr):
    """The codes of the numbers nearest to x / scale, zeros if that is 0, as int32."""
    number = tl.div_rn(x, tl.where(scale == 0, 1.0, scale))
    if KIND == "int8":
        return ((number + _TO_INTEGER) - _TO_INTEGER).to(tl.int32)
    else:
        return to_e4m3(tl.minimum(tl.maximum(number, -448.0), 448.0))


@triton.jit
def numbers_of(code, KIND: tl.constexpr):
    """What codes stand for, before scaling, as float32; floats as they are."""
    if KIND == "int8":
        return code.to(tl.float32)
    elif KIND == "e4m3":
        return from_e4m3(code.to(tl.int32))
    else:
        return code
