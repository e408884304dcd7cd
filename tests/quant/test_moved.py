"""Weights that moved away from a rounded matrix: they keep its codes and parameters where they did not move."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from deepseek_optimizer import quant
from deepseek_optimizer.quant.compensation import compensated, curvature
from deepseek_optimizer.quant.moved import MovedMatrix, between

NAMES = ("int4", "q4_1", "int8")
ROWS, COLS = 37, 83  # neither is a multiple of a tile


def original() -> torch.Tensor:
    return torch.randn(ROWS, COLS, generator=torch.Generator().manual_seed(1))


def start(name: str) -> tuple[Any, torch.Tensor, torch.Tensor]:
    """A format, and the tiles and values of a matrix that was rounded with error compensation, so that packing its values would
    choose other parameters."""
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(96, 96, generator=generator) * torch.logspace(0, -1.5, 96)
    x = torch.randn(400, 96, generator=generator) @ mix
    x[:, COLS:] = 0
    weight = torch.nn.functional.pad(original(), (0, 96 - COLS))
    format: Any = quant.GROUP_FORMATS[name]
    found = compensated(weight, curvature((x.T @ x).double(), format.run), format, packer=quant.reference_packer)
    tiles = format.tiles(found.codes, found.parameters)
    return format, tiles, quant.get_format(name).unpack(tiles, ROWS, COLS)


def moved(name: str, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The values of weights, and those in their tiles."""
    format, tiles, _ = start(name)
    matrix = MovedMatrix(format, format.parameters(tiles))
    values, packed = torch.empty_like(weight), torch.empty_like(tiles)
    matrix.rounded(weight, values)
    matrix.tiles(weight, packed)
    return values, quant.get_format(name).unpack(packed, *weight.shape)


@pytest.mark.parametrize("name", NAMES)
def test_a_matrix_that_did_not_move_is_kept(name: str) -> None:
    _, _, values = start(name)
    rounded, stored = moved(name, values)
    assert torch.equal(rounded, values) and torch.equal(stored, values)


@pytest.mark.parametrize("name", NAMES)
def test_a_start_between_the_original_and_the_rounded_weights(name: str) -> None:
    """It rounds to the same codes, and is closer to the original."""
    format, tiles, values = start(name)
    matrix = MovedMatrix(format, format.parameters(tiles))
    begin = values.clone()
    matrix.start(original(), begin)
    rounded = torch.empty_like(values)
    matrix.rounded(begin, rounded)
    assert (rounded - values).abs().max() < 2e-3 * values.abs().max()  # scales may differ in their last bit
    whole = slice(0, COLS // 32 * 32)  # the last group stays where it is
    assert (begin - original())[:, whole].norm() < 0.9 * (values - original())[:, whole].norm()


def test_groups_of_int3_start_between_too() -> None:
    _, _, values = start("int3")

    def rounded(weight: torch.Tensor) -> torch.Tensor:
        return quant.unpack(quant.pack(weight, "int3"))

    begin = between(original(), values, rounded)
    kept = (rounded(values) == values).float().mean()
    assert ((rounded(begin) == values).float().mean() - kept).abs() < 1e-6 and kept > 0.9
    assert (begin - original()).norm() < 0.95 * (values - original()).norm()


def test_packing_would_choose_other_parameters() -> None:
    _, _, values = start("int4")
    assert not torch.equal(quant.unpack(quant.pack(values, "int4")), values)


@pytest.mark.parametrize("name", NAMES)
def test_parameters_follow_the_weights(name: str) -> None:
    """Weights that grow by 8% are rounded better than with the parameters that they had."""
    format, tiles, values = start(name)
    grown = values[:32, :64] * 1.08
    rounded, stored = moved(name, values * 1.08)
    assert torch.equal(rounded, stored)
    x = grown.unflatten(1, (-1, 32)).permute(2, 0, 1).flatten(1)
    old = tuple(kind[:32, :2].flatten() for kind in format.parameters(tiles))
    fixed = (format.values(format.codes(x, old), old) - x).norm()
    assert (rounded[:32, :64] - grown).norm() < 0.8 * fixed


@pytest.mark.parametrize("name", NAMES)
def test_by_definition(name: str) -> None:
    """Each group alone: codes for its parameters, parameters for these codes by least squares, twice."""
    format, tiles, values = start(name)
    weight = values + 0.1 * torch.randn(values.shape, generator=torch.Generator().manual_seed(2))
    rounded, stored = moved(name, weight)
    assert torch.equal(rounded, stored)
    parameters = format.parameters(tiles)
    for row in range(ROWS):
        for group in range(COLS // 32):
            x = weight[row, 32 * group : 32 * group + 32, None]
            known = tuple(kind[row, group, None] for kind in parameters)
            for _ in range(2):
                codes = format.codes(x, known)
                known = format.refit(x, codes, torch.ones(32))
            expected = format.values(codes, known)[:, 0]
            torch.testing.assert_close(rounded[row, 32 * group : 32 * group + 32], expected, rtol=2e-3, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_groups_of_equal_weights_keep_their_parameters(name: str) -> None:
    rounded, stored = moved(name, torch.zeros(ROWS, COLS))
    assert torch.equal(rounded, stored) and rounded.isfinite().all()
    assert rounded.abs().max() < (0.3 if name == "q4_1" else 1e-6)
