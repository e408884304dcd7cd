"""Cosine and sine of large angles, beside those of the C library."""

from __future__ import annotations

import math

import pytest
import torch

from support import triton_interpreter

triton_interpreter.require()

import triton
import triton.language as tl

from deepseek_optimizer.backends.cuda.kernels.angles import cos_and_sin

COUNT = 4096


@triton.jit
def both(angles, cos, sin, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    c, s = cos_and_sin(tl.load(angles + i))
    tl.store(cos + i, c)
    tl.store(sin + i, s)


@pytest.mark.parametrize("largest", [1.0, 1e6, 1e7])
def test_cosines_and_sines(largest):
    """Of both signs, and around the ends of the quarters."""
    angles = (torch.rand(COUNT, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 2 - 1) * largest
    angles[:64] = torch.arange(-32, 32).double() * math.pi / 4
    cos, sin = torch.empty_like(angles), torch.empty_like(angles)
    both[(1,)](angles, cos, sin, BLOCK=COUNT)
    bound = 1e-12 + 2.0**-53 * largest
    torch.testing.assert_close(cos, angles.cos(), rtol=0, atol=bound)
    torch.testing.assert_close(sin, angles.sin(), rtol=0, atol=bound)
