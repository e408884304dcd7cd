"""Mean squares of input columns, against their definition."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from deepseek_optimizer.calibration.statistics import ColumnSquares


def test_mean_squares_over_all_rows() -> None:
    model = nn.Sequential(nn.Linear(5, 3), nn.Linear(3, 2))
    columns = ColumnSquares()
    batches = [torch.randn(2, 7, 5, dtype=torch.bfloat16).float(), torch.randn(4, 5)]
    with columns.watching({"first": model[0], "second": model[1]}):
        for x in batches:
            model(x)
    model(torch.full((1, 5), 1e6))  # the hooks were removed
    actual = columns.importance()
    rows = torch.cat([x.reshape(-1, 5) for x in batches])
    for name, seen in (("first", rows), ("second", model[0](rows).detach())):
        expected = seen.double().square().mean(0)
        assert actual[name].dtype == torch.float32
        assert torch.allclose(actual[name].double(), expected / expected.mean(), rtol=1e-5)


def test_columns_that_are_always_zero() -> None:
    columns = ColumnSquares()
    columns.add("some", torch.tensor([[0.0, 2.0]]))
    columns.add("all", torch.zeros(3, 2))
    assert columns.importance()["some"].tolist() == [0, 2] and columns.importance()["all"].tolist() == [0, 0]


def test_hooks_are_removed_when_the_model_fails() -> None:
    layer, columns = nn.Linear(2, 2), ColumnSquares()
    with pytest.raises(RuntimeError, match="shapes"), columns.watching({"w": layer}):
        layer(torch.zeros(1, 3))
    assert not layer._forward_pre_hooks
