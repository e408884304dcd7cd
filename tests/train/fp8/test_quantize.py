"""Codes and scales per tile: on the FP8 grid, within the error bound, exact where documented."""

from __future__ import annotations

import math

import pytest
import torch

from deepseek_optimizer.train.fp8.quantize import BLOCK, COLUMN, E4M3, E5M2, ROW, dequantize, quantize, round_trip

TILES = (ROW, COLUMN, BLOCK)
SHAPES = ((1, 1), (3, 127), (128, 128), (129, 257), (1, 640), (300, 5), (2, 130, 200))
SIGNIFICAND = {E4M3: 4, E5M2: 3}  # bits, including the leading one
SMALLEST = {E4M3: 2.0**-9, E5M2: 2.0**-16}
LARGEST = {E4M3: 448.0, E5M2: 57344.0}


def numbers(shape, dtype=torch.bfloat16, seed=0) -> torch.Tensor:
    """Values of very different magnitudes, including zeros."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator) * torch.exp2(torch.randint(-20, 20, shape, generator=generator).float())
    x[torch.rand(shape, generator=generator) < 0.1] = 0
    return x.to(dtype)


def tile_of(x: torch.Tensor, tile: tuple[int, int]):
    """Each tile of x with the index of its scale, by simple loops."""
    for index in [()] if x.dim() == 2 else [(i,) for i in range(x.shape[0])]:
        for r in range(0, x.shape[-2], tile[0]):
            for c in range(0, x.shape[-1], tile[1]):
                yield (*index, slice(r, r + tile[0]), slice(c, c + tile[1])), (*index, r // tile[0], c // tile[1])


def scale_reference(largest: float, dtype: torch.dtype) -> float:
    """The smallest power of two that scales the largest magnitude into the format's range."""
    if largest == 0:
        return 1.0
    scale = 2.0**-100
    while largest / scale > LARGEST[dtype]:
        scale *= 2
    return scale


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("shape", SHAPES)
def test_scales_codes_and_bound(shape, tile, dtype) -> None:
    x = numbers(shape)
    codes, scale = quantize(x, tile, dtype)
    assert codes.dtype == dtype and codes.shape == x.shape and scale.dtype == torch.float32
    back = dequantize(codes, scale, tile, torch.float32)
    places = 0
    for at, place in tile_of(x, tile):
        expected = scale_reference(float(x[at].float().abs().max()), dtype)
        assert float(scale[place]) == expected
        # half a unit in the last place of a value, or half of the smallest step
        bound = torch.maximum(x[at].double().abs() * 2.0 ** -SIGNIFICAND[dtype], torch.tensor(SMALLEST[dtype] * expected / 2))
        assert ((back[at].double() - x[at].double()).abs() <= bound).all()
        places += 1
    assert places == scale.numel()
    assert torch.equal(back[x == 0], torch.zeros_like(back[x == 0]))


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
def test_bf16_represents_code_times_scale_exactly(dtype) -> None:
    codes, scale = quantize(numbers((256, 256)), ROW, dtype)
    exact = dequantize(codes, scale, ROW, torch.float64)
    assert torch.equal(dequantize(codes, scale, ROW, torch.bfloat16).double(), exact)


@pytest.mark.parametrize("tile", TILES)
def test_values_on_the_grid_are_exact(tile) -> None:
    once = round_trip(numbers((200, 300)), tile)
    assert torch.equal(round_trip(once, tile), once)
    assert len(once.float().view(torch.int32).bitwise_and(0x000FFFFF).unique()) == 1, "three bits after the leading one"


def test_rounding_is_to_even_and_keeps_the_largest() -> None:
    x = torch.tensor([[448.0, 17.0, 19.0, 2.0**-10, 3 * 2.0**-10, -448.0]])
    assert round_trip(x, ROW).tolist() == [[448.0, 16.0, 20.0, 0.0, 2 * 2.0**-9, -448.0]]
    assert quantize(torch.tensor([[449.0]]), ROW)[1].item() == 2.0


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_non_finite_values_affect_only_their_tile(bad) -> None:
    x = torch.ones(4, 256, dtype=torch.bfloat16)
    x[2, 130] = bad
    back = round_trip(x, ROW)
    assert back[2, 128:].isnan().all() and torch.equal(back[:2], x[:2]) and torch.equal(back[2, :128], x[2, :128])


def test_extremes_of_size() -> None:
    tiny = torch.full((1, 4), 2.0**-130)
    assert quantize(tiny, ROW)[1].item() == 2.0**-100 and round_trip(tiny, ROW).abs().max() < 2.0**-100
    huge = torch.tensor([[0.9 * torch.finfo(torch.bfloat16).max]], dtype=torch.bfloat16)
    assert round_trip(huge, ROW).isfinite().all() and (round_trip(huge, ROW) / huge - 1).abs().item() < 2**-4


def test_empty() -> None:
    codes, scale = quantize(torch.empty(0, 256), ROW)
    assert codes.shape == (0, 256) and scale.shape == (0, 2)
