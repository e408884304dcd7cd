"""int3: the layout of dso.h in plain Python, the encoder against an exhaustive one in float64, and scales at their limits."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from deepseek_optimizer import quant
from deepseek_optimizer.quant import trellis

VALUES = [-31, -24, -18, -13, -9, -6, -4, -1, 1, 4, 6, 9, 13, 18, 24, 31]
INT3 = quant.get_format("int3")


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def element(tile: np.ndarray, row: int, col: int) -> float:
    """One weight of a tile, located by dso.h's description."""
    quad, byte = divmod(col, 4)
    u = int(tile[quad // 4 * 64 + row * 4 + byte]) >> 2 * (quad % 4) & 3
    path = int(tile[128 + 4 * row : 132 + 4 * row].copy().view(np.uint32)[0])
    p = 8 * byte + [1, 3, 0, 2, 5, 7, 4, 6].index(quad)

    def bit(at: int) -> int:
        return path >> at % 32 & 1

    def mixed(at: int) -> int:
        return bit(at + 1) ^ bit(at - 3)

    subset = mixed(p - 1) + 2 * mixed(p) if p % 2 else bit(p) + 2 * bit(p + 1)
    return float(np.array(int(tile[192 + row]) << 7, np.uint16).view(np.float16)) * VALUES[4 * u + subset]


def test_layout() -> None:
    weight = normal(37, 70)
    packed = INT3.pack(weight)
    values = INT3.unpack(packed, 37, 70)
    tiles = packed.numpy()
    for row in range(37):
        for col in range(70):
            assert values[row, col] == element(tiles[row // 16, col // 32], row % 16, col % 32)
    assert not tiles[2, :, 192 + 5 :].any(), "rows past the end have a scale of zero"


def test_every_code_has_its_value() -> None:
    """Decoded values are encoded to themselves: their error is zero."""
    codes = torch.randint(0, 8, (32, 500), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    values = trellis.decode(codes)
    assert torch.equal(trellis.decode(trellis.encode(values, torch.ones(32, 1))), values)
    assert set(values.unique().tolist()) == set(map(float, VALUES))


def smallest_error(y: np.ndarray, weights: np.ndarray) -> float:
    """The smallest weighted error of a group along any closed path, in float64: of all bits so far, those that later values
    depend on are remembered."""
    order = [4 * quad + byte for byte in range(4) for quad in (1, 3, 0, 2, 5, 7, 4, 6)]
    cost = [[weights[c] * min((y[c] - VALUES[4 * u + subset]) ** 2 for u in range(4)) for subset in range(4)] for c in order]
    best = math.inf
    for first in itertools.product((0, 1), repeat=4):  # the path's bits at positions -3 to 0
        errors = {first: 0.0}
        for t in range(0, 32, 2):  # known: bits at t - 3 to t
            after: dict[tuple[int, ...], float] = {}
            for known, error in errors.items():
                for new in itertools.product((0, 1), repeat=2):
                    h = (*known, *new)  # at t - 3 to t + 2
                    even = h[3] + 2 * h[4]
                    odd = (h[4] ^ h[0]) + 2 * (h[5] ^ h[1])
                    total = error + cost[t][even] + cost[t + 1][odd]
                    after[h[2:]] = min(after.get(h[2:], math.inf), total)
            errors = after
        best = min(best, errors[first])
    return best


@pytest.mark.parametrize("weighted", [False, True])
def test_the_encoder_finds_the_smallest_error(weighted: bool) -> None:
    y = 12 * normal(32, 12, seed=2)
    weights = normal(32, 12, seed=3).exp() if weighted else torch.ones(32, 12)
    error = ((trellis.decode(trellis.encode(y, weights)) - y).square() * weights).double().sum(0)
    bound = trellis.least_error(y, weights)
    for i in range(12):
        best = smallest_error(y[:, i].double().numpy(), weights[:, i].double().numpy())
        assert error[i] == pytest.approx(best, rel=1e-5)
        assert bound[i] <= best * (1 + 1e-5)


def test_the_error_is_below_that_of_larger_formats() -> None:
    weight = normal(128, 512)
    errors = {n: (quant.unpack(quant.pack(weight, n)) - weight).square().mean().item() for n in ("int3", "q3_k", "int4")}
    assert errors["int3"] < 0.0205 and errors["int3"] < 0.85 * errors["q3_k"] and errors["int3"] < 3 * errors["int4"]


def test_scales_at_their_limits() -> None:
    weight = torch.zeros(6, 64)
    weight[0, 3], weight[1, 3], weight[2, 3], weight[3, 3] = math.nan, -math.inf, 1e30, 1e-30
    weight[4, :32] = torch.linspace(-1e6, 1e6, 32)
    weight[5, :32] = torch.linspace(-1e-3, 1e-3, 32)
    packed = INT3.pack(weight)
    got = INT3.unpack(packed, 6, 64)
    assert got[:3, :32].isnan().all() and (packed[0, 0, 192:195] == 0xFC).all()
    assert not got[:, 32:].any() and not got[3].any() and not packed[0, 1].any(), "zeros are exact"
    assert ((got[4:] - weight[4:]).abs() <= INT3.error_bound(weight)[4:]).all() and got[4:, :32].all()
    assert torch.equal(packed, INT3.pack(weight + 0.0)) and torch.equal(packed[0, 1], INT3.pack(-torch.zeros(16, 32))[0, 0])
