"""The formats of K-quants, IQ4 and 5-bit blocks: sizes, the layout of dso.h, and packing of floats."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from deepseek_optimizer import quant
from deepseek_optimizer.quant.blocks import Blocks
from deepseek_optimizer.quant.kquants import BLOCK_FORMATS

NAMES = [f.name for f in BLOCK_FORMATS]
BY_NAME = {f.name: f for f in BLOCK_FORMATS}


def random_weights(rows: int, cols: int) -> torch.Tensor:
    """Rows of different magnitude, an outlier and zeros among them."""
    weight = torch.randn(rows, cols, generator=torch.Generator().manual_seed(rows)) * torch.logspace(-3, 1, rows).unsqueeze(1)
    weight[rows // 2, cols // 2] *= 20
    weight[rows // 3, : cols // 2] = 0
    return weight


@pytest.mark.parametrize("name", NAMES)
def test_bits_are_at_most_4_percent_above_ggmls(name: str) -> None:
    elements, size = GGML_QUANT_SIZES[GGMLQuantizationType[name.upper()]]
    assert BY_NAME[name].bits == BY_NAME[name].tile_bytes / 64
    assert 1 <= BY_NAME[name].bits / (8 * size / elements) <= 1.04


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(1, 256), (17, 512), (300, 768)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_error_stays_within_the_bound(name: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight, fmt = random_weights(*shape).to(dtype), BY_NAME[name]
    packed = fmt.pack(weight)
    assert packed.shape == (math.ceil(shape[0] / 16), shape[1] // 32, fmt.tile_bytes) and packed.dtype == torch.uint8
    error = (fmt.unpack(packed, *shape) - weight.float()).abs()
    bound = fmt.error_bound(weight)
    assert bound.shape == weight.shape and (error <= bound).all(), (error - bound).max()
    if shape[0] == 300:
        least = 0.2 if fmt.searched else 0.45
        assert (error / bound).max() > least, "a bound far above the error would hide a format that wastes bits"


@pytest.mark.parametrize("name", NAMES)
def test_values_of_the_format_are_kept(name: str) -> None:
    """Packing what was unpacked changes no value by more than a rounding of the scales."""
    fmt, weight = BY_NAME[name], torch.randn(16, 512, generator=torch.Generator().manual_seed(1))
    error = [(fmt.unpack(fmt.pack(w), 16, 512) - w).square().mean() for w in (weight, fmt.unpack(fmt.pack(weight), 16, 512))]
    assert error[1] < 0.3 * error[0]


SEARCHED = [f.name for f in BLOCK_FORMATS if f.searched]


@pytest.mark.parametrize("name", SEARCHED)
@pytest.mark.parametrize("shift", [0.0, 2.0, -2.0])
def test_a_search_reduces_the_error(name: str, shift: float) -> None:
    """Compared with scales and minimums that cover each group's range."""
    fmt = BY_NAME[name]
    covering = type("Covering", (type(fmt),), {"searched": False})()
    weight = torch.randn(64, 512, generator=torch.Generator().manual_seed(2)) + shift
    ours, plain = ((f.unpack(f.pack(weight, torch.ones(512)), 64, 512) - weight).square().mean() for f in (fmt, covering))
    assert ours < 0.8 * plain


@pytest.mark.parametrize("name", SEARCHED)
def test_a_search_weighs_the_columns(name: str) -> None:
    fmt, generator = BY_NAME[name], torch.Generator().manual_seed(3)
    weight, importance = torch.randn(64, 512, generator=generator), torch.rand(512, generator=generator) ** 4
    even, weighed = (
        ((fmt.unpack(fmt.pack(weight, i), 64, 512) - weight).square() * importance).mean()
        for i in (torch.ones(512), importance)
    )
    assert weighed < 0.8 * even
    bound = fmt.error_bound(weight)
    for some in (importance * (importance > 0.1), torch.zeros(512)):  # columns without any weight
        packed = fmt.pack(weight, some)
        assert ((fmt.unpack(packed, 64, 512) - weight).abs() <= bound).all()


@pytest.mark.parametrize("name", NAMES)
def test_tiles_and_blocks_are_inverse(name: str) -> None:
    fmt = BY_NAME[name]
    tiles = torch.randint(0, 256, (3, 16, fmt.tile_bytes), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    again = torch.zeros_like(tiles)
    fmt.write(again, fmt.read(tiles))
    assert torch.equal(again, tiles)


def test_the_layout_of_a_superblock() -> None:
    """q6_k: fp16 d[16], then 8 groups of a plane of 4 bits, a plane of 2 bits, and int8 scale[2][16]."""
    codes, scale = torch.zeros(16, 256, dtype=torch.uint8), torch.zeros(16, 16, dtype=torch.int8)
    codes[5, 3 * 32 + 4 * 6 + 1], scale[5, 7] = 0b10_1101, -77  # group 3, quad 6, byte 1
    d = torch.zeros(16, 1, dtype=torch.float16)
    d[5, 0] = 1.5
    tiles = torch.zeros(1, 8, 420, dtype=torch.uint8)
    BY_NAME["q6_k"].write(tiles, Blocks(codes, scale, d=d))
    superblock = tiles.view(-1).numpy()
    group = superblock[32 + 3 * 416 :]
    assert superblock[:32].view(np.float16)[5] == 1.5
    assert group[3 * 64 + 5 * 4 + 1] == 0b1101, "quad 6 of 4 bits: the low half of vector 3"
    assert group[256 + 64 + 5 * 4 + 1] == 0b10 << 4, "quad 6 of 2 bits: bits 4 and 5 of vector 1"
    assert group[384 + 16 + 5] == 256 - 77, "the scale of the second 16 columns"
    assert np.count_nonzero(superblock) == 4, "and nothing else is written"


@pytest.mark.parametrize("name", NAMES)
def test_weights_that_are_not_finite_stay_so(name: str) -> None:
    for bad in (math.nan, math.inf, -math.inf):
        weight = torch.randn(16, 512)
        weight[3, 300] = bad
        got = quant.unpack(quant.pack(weight, name))
        assert not got[3, 288:320].isfinite().any() and got[3, :256].isfinite().all() and got[4].isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_rows_of_a_matrix(name: str) -> None:
    matrix = quant.pack(torch.randn(70, 256), name)
    assert torch.equal(quant.take_rows(matrix, torch.tensor([0, 69, 17])), quant.unpack(matrix)[[0, 69, 17]])


@pytest.mark.parametrize("name", sorted(quant.SUPERBLOCKS))
def test_columns_that_are_no_superblocks(name: str) -> None:
    for cols in (40, 288):
        with pytest.raises(ValueError, match=f"{name} needs a multiple of 256 columns, not {cols}"):
            quant.pack(torch.ones(2, cols), name)
        with pytest.raises(ValueError, match="multiple of 256"):
            BY_NAME[name].unpack(torch.zeros(1, -(-cols // 32), BY_NAME[name].tile_bytes, dtype=torch.uint8), 2, cols)
