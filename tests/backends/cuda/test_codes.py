"""Conversions to and from E4M3 equal torch's."""

from __future__ import annotations

import pytest
import torch

from support import triton_interpreter

triton_interpreter.require()

import triton
import triton.language as tl

from deepseek_optimizer.backends.cuda.kernels.codes import from_e4m3, to_e4m3

from .values import random


@triton.jit
def round_trip(x, codes, numbers, N: tl.constexpr):
    i = tl.arange(0, N)
    code = to_e4m3(tl.load(x + i))
    tl.store(codes + i, code.to(tl.uint8))
    tl.store(numbers + i, from_e4m3(code))


def every_number() -> torch.Tensor:
    """With those in the middle between two, and their neighbors in float32."""
    numbers = torch.arange(256, dtype=torch.int16).to(torch.uint8).view(torch.float8_e4m3fn).float()
    numbers = numbers[numbers.isfinite()].sort().values
    middles = (numbers[1:] + numbers[:-1]) / 2
    around = [torch.nextafter(middles, torch.tensor(end)) for end in (-1e9, 1e9)]
    return torch.cat((numbers, middles, *around, torch.tensor([-0.0, 1e-40, -1e-40])))


@pytest.mark.parametrize("factor", [0.0, 448.0, 1.0, 0.01])
def test_conversions_equal_those_of_torch(factor):
    x = (random(2000) * factor).clamp(-448, 448) if factor else every_number()
    x = torch.nn.functional.pad(x, (0, triton.next_power_of_2(len(x)) - len(x)))
    codes, numbers = torch.empty(len(x), dtype=torch.uint8), torch.empty(len(x))
    round_trip[(1,)](x, codes, numbers, N=len(x))
    exact = x.to(torch.float8_e4m3fn)
    assert torch.equal(codes, exact.view(torch.uint8)) and torch.equal(numbers, exact.float())
