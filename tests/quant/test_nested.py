"""int8_nested against the layout of dso.h and its rule, element by element; the int4 matrix in it; and parts of matrices."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from deepseek_optimizer import quant
from deepseek_optimizer.config import DeepSeekConfig
from deepseek_optimizer.errors import ConfigError
from deepseek_optimizer.quant import PackedMatrix, PackedStack, get_format
from deepseek_optimizer.quant.nested import planes
from deepseek_optimizer.quant.parts import packed_part, stack_part, tile_columns

SHAPES = [(1, 1), (17, 33), (33, 64), (70, 100), (5, 997)]


def matrix(rows: int, cols: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, cols, generator=generator) * torch.logspace(-3, 1, rows).unsqueeze(1)


def stored(packed: torch.Tensor, groups: int, row: int, col: int) -> tuple[int, int, float]:
    """The two nibbles and the scale of an element, located by dso.h's description."""
    tiles = packed[row // 16].numpy().reshape(-1)  # a row of tiles
    group, k = divmod(col, 32)
    place, shift = k // 8 * 64 + row % 16 * 4 + k % 4, 4 * (k // 4 % 2)
    upper, lower = tiles[group * 288 :], tiles[groups * 288 + group * 256 :]
    scale = upper[256:288].view(np.float16)[row % 16]
    return int(upper[place]) >> shift & 15, int(lower[place]) >> shift & 15, float(scale)


def rounded(group: np.ndarray) -> tuple[np.float16, np.ndarray]:
    """The rule of docs/contracts.md for one group: 16 scales, and the codes."""
    f32 = np.float32
    above, below = max(group.max(), f32(0)), max(-group.min(), f32(0))
    step = max(max(above, below) / f32(8), min(above, below) * f32(16) / f32(119))
    sixteen = np.float16(-step if below < above else step)
    if not sixteen:
        return np.float16(0), np.zeros(len(group))
    return sixteen, np.clip(np.rint(group * (f32(1) / (f32(sixteen) / f32(16)))), -128, 119)


@pytest.mark.parametrize("shape", SHAPES)
def test_codes_and_scales_are_those_of_the_rule(shape: tuple[int, int]) -> None:
    weight, groups = matrix(*shape), math.ceil(shape[1] / 32)
    weight[0, : shape[1] // 2] = 0
    weight[-1] = weight[-1].sign()  # both signs are equally large
    packed = quant.pack(weight, "int8_nested")
    values = quant.unpack(packed)
    for row in {0, shape[0] // 2, shape[0] - 1}:
        for group in range(groups):
            columns = range(32 * group, min(32 * group + 32, shape[1]))
            scale, codes = rounded(weight[row, columns].numpy())
            for col, code in zip(columns, codes, strict=True):
                upper, lower, sixteen = stored(packed.data, groups, row, col)
                assert sixteen == float(scale) and 16 * (upper - 8) + lower - 8 == code
                assert values[row, col] == np.float32(scale) / np.float32(16) * np.float32(code)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_upper_parts_are_an_int4_matrix(shape: tuple[int, int]) -> None:
    """The nearest one with its scales: rounding int8 codes further."""
    weight = matrix(*shape)
    packed = quant.pack(weight, "int8_nested")
    upper, _ = planes(packed.data)
    part = quant.unpack(PackedMatrix("int4_nested", *shape, packed.data))
    assert torch.equal(part, quant.unpack(PackedMatrix("int4", *shape, upper.contiguous())))
    scale = get_format("int4").parameters(upper.contiguous())[0].float()
    steps = scale[: shape[0]].repeat_interleave(32, 1)[:, : shape[1]].abs()
    assert ((quant.unpack(packed) - part).abs() <= steps / 2).all()
    assert torch.equal(get_format("int4_nested").pack(weight), packed.data), "they are the same bytes"


def test_no_element_is_clipped() -> None:
    """Unlike int4, whose side with the smaller elements has one code less."""
    weight = torch.ones(16, 32)
    weight[:, ::2] = -1
    error = (quant.unpack(quant.pack(weight, "int8_nested")) - weight).abs().max()
    assert error < 1 / 119 / 2
    assert (quant.unpack(quant.pack(weight, "int4")) - weight).abs().max() > 0.05


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_groups_that_are_not_finite_become_nan(bad: float) -> None:
    weight = torch.ones(16, 64)
    weight[3, 40] = bad
    got = quant.unpack(quant.pack(weight, "int8_nested"))
    assert got[3, 32:].isnan().all() and got[3, :32].isfinite().all() and got[4].isfinite().all()


def test_error_bound_of_the_nested_matrix() -> None:
    weight = matrix(70, 100)
    fmt = get_format("int4_nested")
    error = (fmt.unpack(fmt.pack(weight), 70, 100) - weight).abs()
    bound = fmt.error_bound(weight)
    assert (error <= bound).all() and (error / bound).max() > 0.8


def test_parts_of_a_matrix_have_the_bits_of_the_whole() -> None:
    """Columns are not consecutive tiles: the lower parts of a row follow all of its tiles."""
    packed = quant.pack(matrix(70, 200), "int8_nested")
    whole = quant.unpack(packed)
    for rows, cols in (((16, 48), None), (None, (32, 96)), ((16, 70), (64, 200))):
        part = packed_part(packed, rows, cols)
        wanted = whole[slice(*(rows or (0, 70))), slice(*(cols or (0, 200)))]
        assert torch.equal(quant.unpack(part), wanted)
        nested = PackedMatrix("int4_nested", *part.shape, part.data)
        both = PackedMatrix("int4_nested", 70, 200, packed.data)
        assert torch.equal(quant.unpack(nested), quant.unpack(both)[slice(*(rows or (0, 70))), slice(*(cols or (0, 200)))])
    stack = PackedStack("int8_nested", 2, 70, 200, torch.stack([packed.data, packed.data]))
    part = stack_part(stack, (1, 2), (0, 32), (32, 64))
    assert torch.equal(quant.unpack(part.matrix(0)), whole[:32, 32:64])
    assert tile_columns(quant.pack(matrix(16, 64), "int8").data, "int8", 1, 2).shape == (1, 1, 544)


def test_a_format_that_is_only_read_cannot_be_packed_by_a_config() -> None:
    assert "int4_nested" not in quant.FORMATS and get_format("int4_nested").name == "int4_nested"
    with pytest.raises(ConfigError, match="only read out of another format"):
        DeepSeekConfig(formats={"lm_head": "int4_nested"})
    with pytest.raises(ConfigError, match="precision must be one of"):
        DeepSeekConfig(precision="int4_nested")
