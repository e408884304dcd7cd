"""q4_1: 4-bit codes with an fp16 scale and minimum per group of 32 columns (5 bits per weight). ggml's Q4_1 represents the same
values.

The first candidate is ggml's: codes from the group's minimum to its maximum. Ranges trimmed at either end are tried too, and
the best one is fitted (`search.py`).
"""

from __future__ import annotations

from typing import ClassVar

import torch

from .base import TILE_COLS, Parameters
from .groups import grouped, join_nibbles, round_scale, scale_error, split_nibbles, to_words, ungroup
from .search import REFIT, Best, best_of, by_column, error_weights, in_order, nearest, pad_importance, weighted_error, within
from .tiles import pack_panels, pad_to_tiles, read_tiles, tiles_of, unpack_panels

# Fractions of a group's range that are trimmed, below and above; the first pair is ggml's choice.
TRIMS = tuple((below / 32, above / 32) for below in range(4) for above in range(4))
_MAX = TRIMS[-1][0]
SHIFT = 1 / 2  # maximum change of the minimum by a fit, in steps


class Q4_1:
    """320 bytes per tile: nibbles as in int4, with q in [0, 15], fp16 scale[16], fp16 min[16]. W = scale * q + min."""

    name: ClassVar[str] = "q4_1"
    code: ClassVar[int] = 4
    tile_bytes: ClassVar[int] = 320
    bits: ClassVar[float] = 5.0
    activation: ClassVar[str] = "q16"
    run: ClassVar[int] = 1

    @staticmethod
    def pack(weight: torch.Tensor, importance: torch.Tensor | None = None) -> torch.Tensor:
        """float [N, K], importance float32 [K] -> uint8 [ceil(N/16), ceil(K/32), 320]."""
        padded, tail = pad_importance(importance, weight.shape[-1]), weight.shape[-1] % TILE_COLS
        return pack_panels(weight, Q4_1.tile_bytes, lambda panel: _encode(panel, padded, tail))

    @staticmethod
    def unpack(packed: torch.Tensor, rows: int, cols: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """uint8 tiles -> float [rows, cols]: the product is exact in float32 and the sum is rounded once, as in ggml."""
        return unpack_panels(packed, rows, cols, dtype, _decode, words=4, halves=2)

    @staticmethod
    def error_bound(weight: torch.Tensor, importance: torch.Tensor | None = None) -> torch.Tensor:
        """Half the largest possible step, or the distance to the narrowest range, plus both roundings of all three."""
        groups = grouped(pad_to_tiles(weight))
        low, high = (x.unsqueeze(-1) for x in _range(groups, weight.shape[-1] % TILE_COLS))
        step = (high - low) / 15
        long, trim = step * (1 + REFIT), _MAX * (high - low)
        bottom, top = low + trim + long * SHIFT, high - trim - (SHIFT + 15 * REFIT) * step
        rounding = 32 * scale_error(long) + scale_error(low) + scale_error(bottom) + 2.0**-22 * (low.abs() + groups.abs())
        return ungroup(torch.maximum(long / 2, torch.maximum(bottom - groups, groups - top)) + rounding, weight)

    @staticmethod
    def fit(x: torch.Tensor, importance: torch.Tensor) -> Parameters:
        low, high = x.amin(0), x.amax(0)
        trims = torch.tensor(TRIMS, device=x.device, dtype=torch.float32).unsqueeze(-1)
        bottom, top = low + (high - low) * trims[:, 0], high - (high - low) * trims[:, 1]
        tried = (round_scale((top - bottom) / 15), round_scale(bottom))
        scale, minimum = best_of(x, importance, tried, Q4_1.codes, Q4_1.values)
        fitted = Q4_1.refit(x, Q4_1.codes(x, (scale, minimum)), importance)
        pairs = tuple(torch.stack(pair) for pair in zip((scale, minimum), fitted, strict=True))
        return best_of(x, importance, pairs, Q4_1.codes, Q4_1.values)

    @staticmethod
    def refit(x: torch.Tensor, codes: torch.Tensor, importance: torch.Tensor) -> Parameters:
        weights = (importance / importance.sum()).unsqueeze(1)
        mean_q, mean_x = (weights * codes).sum(0), (weights * x).sum(0)
        wq = weights * (codes - mean_q)
        scale = round_scale(((wq * x).sum(0) / (wq * codes).sum(0)).nan_to_num_(0.0))
        return scale, round_scale(mean_x - scale.float() * mean_q)

    @staticmethod
    def codes(x: torch.Tensor, parameters: Parameters) -> torch.Tensor:
        return nearest(x - parameters[1].float(), parameters[0], 0, 15)

    @staticmethod
    def values(codes: torch.Tensor, parameters: Parameters) -> torch.Tensor:
        return codes * parameters[0].float() + parameters[1].float()

    @staticmethod
    def parameters(tiles: torch.Tensor) -> Parameters:
        return read_tiles(tiles, words=4, halves=2)[1]

    @staticmethod
    def tiles(codes: torch.Tensor, parameters: Parameters) -> torch.Tensor:
        return tiles_of(join_nibbles(to_words(grouped(codes))), parameters, Q4_1.tile_bytes)


def _range(groups: torch.Tensor, tail: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Minimum and maximum of each group, [n, g, 32] -> 2 x [n, g]. `tail`: columns in use of the last group; 0: all."""
    low, high = groups.amin(-1), groups.amax(-1)
    if tail:
        low[:, -1], high[:, -1] = groups[:, -1, :tail].amin(-1), groups[:, -1, :tail].amax(-1)
    return low, high


def _encode(panel: torch.Tensor, importance: torch.Tensor | None, tail: int) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    groups = grouped(panel)
    x = by_column(groups)
    scale, minimum = _search(x, *_range(groups, tail), importance)
    broken = ~(scale.isfinite() & minimum.isfinite())
    scale, minimum = scale.masked_fill(broken, torch.nan), minimum.masked_fill(broken, 0.0)
    q = nearest(x - minimum.float(), scale, 0, 15).masked_fill_(broken, 0.0).permute(1, 2, 0).contiguous()
    if tail:
        q[:, -1, tail:] = 0
    return join_nibbles(to_words(q)), (scale, minimum)


def _search(
    x: torch.Tensor, low: torch.Tensor, high: torch.Tensor, importance: torch.Tensor | None
) -> tuple[torch.Tensor, ...]:
    """The best scales and minima, fp16 [n, g], for groups x, float32 [32, n, g], whose range is low to high, [n, g]."""
    weights = error_weights(x, importance)
    best = Best()

    def consider(scale: torch.Tensor, minimum: torch.Tensor) -> None:
        y = x - minimum.float()
        best.consider(weighted_error(y, nearest(y, scale, 0, 15), scale, weights), (scale, minimum))

    span = high - low
    for below, above in TRIMS:
        bottom = low + span * below
        consider(round_scale((high - span * above - bottom) / 15), round_scale(bottom))
    scale, minimum = best.chosen
    consider(*_fitted(x, scale, minimum, weights))
    return best.chosen


def _fitted(
    x: torch.Tensor, scale: torch.Tensor, minimum: torch.Tensor, weights: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The least-squares scale and minimum for the codes that the given ones produce, limited by REFIT and SHIFT."""
    old, y = scale.float(), x - minimum.float()
    q = nearest(y, scale, 0, 15)
    wq = weights * q
    total, sum_q, sum_qq = in_order(weights.expand_as(x)), in_order(wq), in_order(wq * q)
    sum_y, sum_qy = in_order(weights * y), in_order(wq * y)
    determinant = total * sum_qq - sum_q * sum_q
    new = old + within((total * sum_qy - sum_q * sum_y) / determinant - old, old.abs() * REFIT)
    moved = minimum.float() + within((sum_qq * sum_y - sum_q * sum_qy) / determinant, old.abs() * SHIFT)
    return round_scale(new), round_scale(moved)


def _decode(words: torch.Tensor, halves: tuple[torch.Tensor, ...]) -> torch.Tensor:
    scale, minimum = (h.float().unsqueeze(-1) for h in halves)
    return split_nibbles(words).float() * scale + minimum
