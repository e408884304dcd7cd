"""Rows of an int4 cache: the transform against its matrix in float64, and the rounding against a search over all scales."""

from __future__ import annotations

import pytest
import torch

from deepseek_optimizer.backends.reference import int4_rows
from deepseek_optimizer.quant.blocks import IQ4_VALUES


def matrix(length: int) -> torch.Tensor:
    """The block-diagonal Hadamard matrix in float64, by Sylvester's construction."""
    blocks = []
    for order in (1 << bit for bit in reversed(range(10)) if length >> bit & 1):
        block = torch.ones(1, 1, dtype=torch.float64)
        while len(block) < order:
            block = torch.cat((torch.cat((block, block), 1), torch.cat((block, -block), 1)))
        blocks.append(block)
    return torch.block_diag(*blocks)


def rows(length: int, count: int = 40) -> torch.Tensor:
    """Rows with an outlier each."""
    x = torch.randn(count, length, generator=torch.Generator().manual_seed(length))
    x[torch.arange(count), torch.arange(count) % length] *= 20
    return x


@pytest.mark.parametrize("length", [2, 6, 16, 64, 80, 96, 128, 254, 512])
def test_the_transform_keeps_products(length: int) -> None:
    x, q, h = rows(length).double(), torch.randn(40, length, dtype=torch.float64), matrix(length)
    assert torch.equal(h @ h.T, torch.diag(h.square().sum(0)))
    torch.testing.assert_close(int4_rows.hadamard(x), x @ h.T)
    torch.testing.assert_close(int4_rows.hadamard_inverse(int4_rows.hadamard(x)), x)
    products = (int4_rows.hadamard_inverse(q) * int4_rows.hadamard(x)).sum(-1)
    torch.testing.assert_close(products, (q * x).sum(-1))


@pytest.mark.parametrize("length", [40, 64, 128])
def test_the_error_is_near_the_best(length: int) -> None:
    """The squared error is at most 1.5 times that of the best of 2,000 scales, in sum 1.1 times."""
    x = rows(length)
    codes, scale = int4_rows.quantized(x)
    assert codes.shape == (40, length // 2) and scale.shape == (40,)
    error = (int4_rows.dequantized(codes, scale) - x).double().square().sum(-1)
    y, values = x.double() @ matrix(length).T, torch.tensor(IQ4_VALUES, dtype=torch.float64)
    orders = matrix(length).square().sum(0)
    best = torch.full((40,), torch.inf, dtype=torch.float64)
    for step in torch.linspace(0.005, 0.011, 1000):
        for sign in (-1, 1):
            s = sign * step * y.abs().amax(-1, keepdim=True)
            nearest = values[(y[..., None] / s[..., None] - values).abs().argmin(-1)] * s
            best = torch.minimum(best, ((nearest - y).square() / orders).sum(-1))
    assert (error <= 1.5 * best + 1e-9).all() and error.sum() <= 1.1 * best.sum() + 1e-9


def test_outliers_do_not_spoil_a_row() -> None:
    """The error of a row with an outlier is that of a row without; evenly spaced codes without the transform lose the rest."""
    x = rows(64)
    error = (int4_rows.dequantized(*int4_rows.quantized(x)) - x).norm(dim=-1) / x.norm(dim=-1)
    assert 0.04 < error.mean() < 0.09


def test_special_rows() -> None:
    x = torch.randn(5, 16)
    x[1], x[2, 3], x[3, 0], x[4] = 0, torch.nan, torch.inf, 1e-38
    codes, scale = int4_rows.quantized(x)
    assert scale[1] == scale[4] == 0 and scale[2:4].isnan().all() and scale[0] != 0
    back = int4_rows.dequantized(codes, scale)
    assert not back[1].any() and back[2:4].isnan().all() and back[0].isfinite().all()
