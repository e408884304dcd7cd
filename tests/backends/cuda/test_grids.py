"""Heads with the terms of relative positions, and padding, equal those of the reference."""

from __future__ import annotations

import pytest
import torch

from support import triton_interpreter

triton_interpreter.require()

from deepseek_optimizer.backends.cuda.kernels import grids
from deepseek_optimizer.backends.reference import grids as exact

from .values import random


@pytest.mark.parametrize(
    ("rows", "cols", "heads", "head", "width"), [(2, 3, 3, 10, 16), (5, 4, 17, 6, 15), (18, 33, 2, 20, 72)]
)
def test_longer_heads(rows, cols, heads, head, width):
    """More heads than a program has, and as many elements as there are terms; no zeros, and some."""
    at = torch.cartesian_prod(torch.arange(rows), torch.arange(cols))[3:][-20:]
    places = torch.cat((torch.zeros(len(at), 1, dtype=torch.long), at), 1).T.to(torch.int32).contiguous()
    x, out = random(len(at), heads * head), torch.full((len(at), heads * width), torch.nan)
    by_row, by_col = random(2 * rows - 1, head, seed=1), random(2 * cols - 1, head, seed=2)
    grids.grid_queries(x, places, by_row, by_col, out, heads, 0.3)
    torch.testing.assert_close(out, exact.grid_queries(x, at, by_row, by_col, heads, 0.3, width), rtol=1e-5, atol=1e-5)
    out.fill_(torch.nan)
    grids.grid_keys(x, places, out, heads, rows, cols)
    assert torch.equal(out, exact.grid_keys(x, at, rows, cols, heads, width))


def test_padding():
    x, times = random(35, 70), torch.arange(35, dtype=torch.int32) % 3
    expected = exact.zero_padding(x, times != 0)
    grids.zero_padding(x, times, x)
    assert torch.equal(x, expected)
