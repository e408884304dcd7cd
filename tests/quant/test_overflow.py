"""Weights at the ends of the range: in every format they are finite, or it is known that they are not."""

from __future__ import annotations

import pytest
import torch

from deepseek_optimizer import quant
from deepseek_optimizer.quant.overflow import SAFE, largest_magnitude, overflow_of

ROWS, COLS = 16, 256
ALWAYS_FIT = {"fp32", "fp8", "mxfp4"}  # have a range like that of fp32
UP_TO_A_MILLION = ALWAYS_FIT | {"bf16", "int8", "int3", "q3_k", "q4_k", "q5_k", "q6_k", "iq4_xs", "iq4_nl", "q5_0"}


def matrix(largest: float) -> torch.Tensor:
    """Weights of both signs up to this magnitude; rows of one sign, and rows of small weights with one of this magnitude."""
    generator = torch.Generator().manual_seed(0)
    weight = (torch.rand(ROWS, COLS, generator=generator) * 2 - 1) * largest
    weight[0, 0], weight[1, 5] = largest, -largest
    weight[2], weight[3] = weight[2].abs(), -weight[3].abs()
    weight[4] *= 1e-6
    weight[4, 7] = -largest
    return weight


def packed(weight: torch.Tensor, name: str) -> tuple[torch.Tensor, str | None]:
    format = quant.get_format(name)
    tiles = format.pack(weight)
    return format.unpack(tiles, ROWS, COLS), overflow_of(weight, tiles, name)


@pytest.mark.parametrize("name", quant.FORMATS)
@pytest.mark.parametrize("largest", [0.0, 1e-44, 1e-30, 1.0, SAFE])
def test_small_weights_are_finite_in_all_formats(name: str, largest: float) -> None:
    weight = matrix(largest)
    values, problem = packed(weight, name)
    assert problem is None and values.isfinite().all()
    assert ((values - weight).abs() <= quant.get_format(name).error_bound(weight)).all()


@pytest.mark.parametrize("name", quant.FORMATS)
@pytest.mark.parametrize("largest", [6e4, 1e5, 1e6, 1e30, torch.finfo(torch.float32).max])
def test_an_overflow_is_found(name: str, largest: float) -> None:
    weight = matrix(largest)
    values, problem = packed(weight, name)
    assert (problem is None) == bool(values.isfinite().all())
    if largest <= (1e30 if name in ALWAYS_FIT else 1e6 if name in UP_TO_A_MILLION else 0):
        assert problem is None
    elif largest > 1e6 and name not in (*ALWAYS_FIT, "bf16"):
        assert problem is not None and f"too large for {name}" in problem and 'formats={NAME: "bf16"}' in problem
    if problem is None:
        assert ((values - weight).abs() <= quant.get_format(name).error_bound(weight)).all()


@pytest.mark.parametrize("name", quant.FORMATS)
@pytest.mark.parametrize("wrong", [torch.nan, torch.inf, -torch.inf])
def test_weights_that_are_not_finite_never_become_finite(name: str, wrong: float) -> None:
    """So that a reader that does not check its files sees that they are damaged, too."""
    weight = matrix(1.0)
    weight[3, 9] = wrong
    values, problem = packed(weight, name)
    assert not values[3].isfinite().all()
    assert problem is None, "that is not an overflow"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_largest_magnitude(dtype: torch.dtype) -> None:
    values = torch.tensor([[0.5, -3.0], [2.0, -0.0]], dtype=dtype)
    assert largest_magnitude(values) == 3.0 and largest_magnitude(-values) == 3.0 and largest_magnitude(values.t()[:1]) == 2.0
    assert largest_magnitude(-values.abs()) == 3.0 and largest_magnitude(values[:0]) == 0.0
    assert largest_magnitude(torch.zeros(3, dtype=torch.int64)) == 0.0
    for wrong in (torch.inf, -torch.inf):
        values[0, 0] = wrong
        assert largest_magnitude(values) == torch.inf
    values[0, 0] = torch.nan
    assert largest_magnitude(values) != largest_magnitude(values)
