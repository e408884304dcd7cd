"""Cosine and sine of large angles. Those of libdevice have a slow path for the largest ones, whose table takes a stack."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def cos_and_sin(angle):
    """float64 cosine and sine of float64 angles, off by less than 1e-12 + 2^-53 |angle|.

    The angle is reduced to [-pi/4, pi/4] (Cody and Waite 1980), where Taylor's series of 8 terms are off by 2e-15. The first
    part of pi/2 has 33 bits, so that its multiples up to 2^20 are exact.
    """
    turns = tl.floor(angle * 0.6366197723675814 + 0.5)  # quarters of a circle
    x = angle - turns * 1.5707963267341256 - turns * 6.077100506506192e-11
    s = x * x
    cos = -1.0 / 87178291200.0
    cos = cos * s + 1.0 / 479001600.0
    cos = cos * s - 1.0 / 3628800.0
    cos = cos * s + 1.0 / 40320.0
    cos = cos * s - 1.0 / 720.0
    cos = cos * s + 1.0 / 24.0
    cos = cos * s - 0.5
    cos = cos * s + 1.0
    sin = -1.0 / 1307674368000.0
    sin = sin * s + 1.0 / 6227020800.0
    sin = sin * s - 1.0 / 39916800.0
    sin = sin * s + 1.0 / 362880.0
    sin = sin * s - 1.0 / 5040.0
    sin = sin * s + 1.0 / 120.0
    sin = sin * s - 1.0 / 6.0
    sin = (sin * s + 1.0) * x
    quarter = turns - 4.0 * tl.floor(turns * 0.25)  # 0 to 3
    swapped = (quarter == 1.0) | (quarter == 3.0)
    first, second = tl.where(swapped, sin, cos), tl.where(swapped, cos, sin)
    return tl.where((quarter == 1.0) | (quarter == 2.0), -first, first), tl.where(quarter >= 2.0, -second, second)
