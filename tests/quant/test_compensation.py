"""Compensated rounding against its definition, column by column in float64, for every format that supports it."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch

from deepseek_optimizer import quant
from deepseek_optimizer.quant.compensation import compensated, curvature, product_error, with_product
from deepseek_optimizer.quant.int4 import Int4

ROWS, COLS = 37, 96


class InRuns(Int4):
    """int4 rounded four columns at a time."""

    run: ClassVar[int] = 4


def inputs(seed: int = 0, count: int = 400) -> torch.Tensor:
    """Correlated inputs of very different magnitude, float64 [count, COLS]."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(COLS, COLS, generator=generator, dtype=torch.float64) * torch.logspace(0, -1.5, COLS, dtype=torch.float64)
    return torch.randn(count, COLS, generator=generator, dtype=torch.float64) @ mix.t()


def weights(rows: int = ROWS) -> torch.Tensor:
    return torch.randn(rows, COLS, generator=torch.Generator().manual_seed(1))


def of(x: torch.Tensor, run: int = 1) -> Any:
    return curvature(x.t() @ x, run)


def rounded(weight: torch.Tensor, factored: Any, format: Any, sweeps: int = 1) -> Any:
    return compensated(weight, factored, format, sweeps, quant.reference_packer)


def by_definition(weight: torch.Tensor, x: torch.Tensor, format: quant.GroupFormat) -> torch.Tensor:
    """Values, float64 [N, K]: GPTQ as published, with the inverse of H updated column by column."""
    h = x.t() @ x
    h = h / h.diagonal().mean() + 0.01 * torch.eye(COLS, dtype=torch.float64)
    w, result = weight.double().clone(), torch.zeros(weight.shape, dtype=torch.float64)
    for group in range(0, COLS, 32):
        rest = torch.linalg.cholesky(torch.linalg.inv(h[group:, group:]), upper=True)  # the usual factor of GPTQ
        importance = 1 / rest.diagonal()[:32] ** 2
        parameters = format.fit(w[:, group : group + 32].t().contiguous().float(), importance.float())
        for k in range(group, group + 32):
            inverse = torch.linalg.inv(h[k:, k:])
            result[:, k] = format.values(format.codes(w[:, k][None].float(), parameters), parameters)[0].double()
            w[:, k:] -= ((w[:, k] - result[:, k]) / inverse[0, 0])[:, None] * inverse[0][None]
    return result


@pytest.mark.parametrize("name", [name for name, format in quant.GROUP_FORMATS.items() if format.run == 1])
def test_the_fast_form_equals_gptq(name: str) -> None:
    format, x = quant.GROUP_FORMATS[name], inputs()
    actual = compensated(weights(), of(x), format, sweeps=0).values(format)
    assert torch.equal(actual.double(), by_definition(weights(), x, format))


@pytest.mark.parametrize("name", quant.GROUP_FORMATS)
def test_the_error_of_the_product_shrinks(name: str) -> None:
    format, x, weight = quant.GROUP_FORMATS[name], inputs(), weights()
    factored = of(x, format.run).to(torch.float32)
    importance = x.square().mean(0).float()
    nearest = product_error(weight, quant.unpack(quant.pack(weight, name, importance=importance)), factored)
    errors = [product_error(weight, rounded(weight, factored, format, n).values(format), factored) for n in range(4)]
    assert errors[0].sum() < 0.7 * nearest.sum()
    for before, after in zip(errors, errors[1:], strict=False):
        assert (after <= before * (1 + 1e-4)).all(), "a sweep makes no row worse"
    assert errors[2].sum() < 0.97 * errors[0].sum()


@pytest.mark.parametrize("name", quant.GROUP_FORMATS)
def test_tiles_hold_the_codes(name: str) -> None:
    format = quant.GROUP_FORMATS[name]
    found = rounded(weights(), of(inputs(), format.run), format)
    tiles = format.tiles(found.codes, found.parameters)
    assert torch.equal(quant.get_format(name).unpack(tiles, ROWS, COLS), found.values(format))


def test_whole_groups_are_compensated_by_those_that_follow() -> None:
    """By definition: the rest of the matrix is moved to where it is best for the group as rounded."""
    x, format, moved = inputs(), quant.GROUP_FORMATS["int3"], weights().double()
    factored = of(x, format.run)
    h, values = factored.second_moment, torch.zeros(ROWS, COLS, dtype=torch.float64)
    for group in range(0, COLS, 32):
        here, rest = slice(group, group + 32), slice(group + 32, COLS)
        packed = quant.pack(moved[:, here].float(), "int3", importance=factored.weights[here].float())
        values[:, here] = quant.unpack(packed)
        if group + 32 < COLS:
            error = moved[:, here] - values[:, here]
            moved[:, rest] += error @ h[here, rest] @ torch.linalg.inv(h[rest, rest])
    assert torch.equal(rounded(weights(), factored, format, sweeps=0).values(format).double(), values)


def test_columns_rounded_in_runs() -> None:
    x, weight = inputs(), weights()
    factored = of(x, run=4)
    unit = torch.eye(COLS, dtype=torch.float64) + factored.feedback
    inner = torch.linalg.solve(unit, torch.linalg.solve(unit, factored.second_moment).t())
    blocks = inner.unflatten(0, (-1, 4)).unflatten(2, (-1, 4))
    for i in range(COLS // 4):
        assert torch.allclose(blocks[i, :, i].diagonal(), factored.weights[4 * i : 4 * i + 4])
        blocks[i, :, i] = 0
    assert blocks.abs().max() < 1e-9, "H = (I + F) D (I + F)^T with D block diagonal"
    in_runs, one_by_one = (
        product_error(weight, compensated(weight, of(x, f.run), f, sweeps=0).values(f), factored).sum()
        for f in (InRuns(), Int4())
    )
    nearest = product_error(weight, quant.unpack(quant.pack(weight, "int4", importance=x.square().mean(0).float())), factored)
    assert one_by_one <= in_runs * 1.05 < nearest.sum()


def test_many_rows_are_rounded_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    format, factored = quant.GROUP_FORMATS["int4"], of(inputs())
    whole = compensated(weights(), factored, format)
    monkeypatch.setattr("deepseek_optimizer.quant.compensation.ROWS", 16)
    parts = compensated(weights(), factored, format)
    assert torch.equal(whole.codes, parts.codes) and torch.equal(whole.parameters[0], parts.parameters[0])


def test_wanted_changes_of_products() -> None:
    x = inputs()
    y = x + 0.3 * inputs(seed=2)
    weight = weights().double()
    wanted = weight @ ((x - y).t() @ y) / (y.t() @ y).diagonal().mean()
    moved = with_product(weight, wanted, of(y))
    assert (x @ weight.t() - y @ moved.t()).square().sum() < 0.8 * ((x - y) @ weight.t()).square().sum()
    assert torch.equal(with_product(weight, torch.zeros_like(weight), of(y)), weight)


def test_columns_that_are_never_used() -> None:
    x = inputs()
    x[:, 32:70] = 0
    found = compensated(weights(), of(x), Int4()).values(Int4())
    assert found.isfinite().all()
    assert not found.any(1).logical_not().any()
    assert torch.isfinite(of(torch.zeros(3, COLS, dtype=torch.float64)).feedback).all(), "nor any column at all"
