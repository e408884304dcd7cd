"""Packed matrices whose columns are stored in another order: every product and look-up is in the model's order."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from deepseek_optimizer.quant import ColumnOrder, pack, take_rows, unpack
from deepseek_optimizer.quant.products import linear, linear_gradient, unpack_rows


def test_the_first_run_of_every_group_comes_first() -> None:
    order = ColumnOrder(groups=2, each=3)
    columns = torch.arange(12)  # runs of two
    assert order.stored(columns).tolist() == [0, 1, 6, 7, 2, 3, 8, 9, 4, 5, 10, 11]
    rows = torch.randn(4, 5, 24, generator=torch.Generator().manual_seed(0))
    assert torch.equal(order.restored(order.stored(rows)), rows) and torch.equal(order.stored(order.restored(rows)), rows)


@pytest.mark.parametrize("format", ["fp32", "int8", "q4_k"])
def test_matrices_in_another_order(format: str) -> None:
    generator = torch.Generator().manual_seed(1)
    order = ColumnOrder(groups=2, each=4)
    given = torch.randn(37, 256, generator=generator)
    stored = pack(order.stored(given), format)
    matrix = replace(stored, order=order)
    dense = unpack(matrix)
    assert (matrix.as_stored.data is stored.data) and matrix.as_stored.order is None
    assert torch.equal(dense, order.restored(unpack(stored)))
    assert (dense - given).abs().max() < 0.3, "not the order in which they are stored"
    assert torch.equal(unpack_rows(matrix, 16, 33), dense[16:33])
    assert torch.equal(take_rows(matrix, torch.tensor([[36, 0], [5, 5]])), dense[torch.tensor([[36, 0], [5, 5]])])
    x, grad = torch.randn(3, 256, generator=generator), torch.randn(2, 37, generator=generator)
    torch.testing.assert_close(linear(x, matrix), x @ dense.T)
    torch.testing.assert_close(linear_gradient(grad, matrix), grad @ dense)
