"""int4: symmetric, groups of 32 columns, one fp16 scale each (4.5 bits per weight). ggml's Q4_0 represents the same values.

The first candidate scale is ggml's: the element of largest magnitude becomes exactly -8, so that its side has the full range of
codes. If the columns' importance is known, scales that clip that element or favor the other side are tried too. Otherwise they
are not: on SmolLM2, the smallest unweighted error gave a larger KL divergence than ggml's scale (0.39 against 0.33). The best
candidate is then fitted (`search.py`).
"""

from __future__ import annotations

from typing import ClassVar

import torch

from .base import Parameters
from .groups import grouped, join_nibbles, round_scale, scale_error, split_nibbles, to_words, ungroup
from .search import (
    REFIT,
    Best,
    best_of,
    by_column,
    error_weights,
    in_order,
    nearest,
    pad_importance,
    scale_for,
    weighted_error,
    within,
)
from .tiles import pack_panels, pad_to_tiles, read_tiles, tiles_of, unpack_panels

# Candidates for the code of the element of largest magnitude. The first is ggml's; without importance, it is the only one.
ENDS = (-8.0, -6.5, -7.0, -7.5, -8.5, -9.0, -9.5, 6.5, 7.0, 7.5, 8.0, 8.5, 9.0, 9.5)


class Int4:
    """288 bytes per tile: nibbles [4 j][16 r][4] = w + 8 (low: 8j + b, high: 8j + 4 + b), fp16 scale[16]; W = scale * w."""

    name: ClassVar[str] = "int4"
    code: ClassVar[int] = 3
    tile_bytes: ClassVar[int] = 288
    bits: ClassVar[float] = 4.5
    activation: ClassVar[str] = "q8"
    run: ClassVar[int] = 1

    @staticmethod
    def pack(weight: torch.Tensor, importance: torch.Tensor | None = None) -> torch.Tensor:
        """float [N, K], importance float32 [K] -> uint8 [ceil(N/16), ceil(K/32), 288]."""
        padded = pad_importance(importance, weight.shape[-1])
        return pack_panels(weight, Int4.tile_bytes, lambda panel: _encode(panel, padded))

    @staticmethod
    def unpack(packed: torch.Tensor, rows: int, cols: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """uint8 tiles -> float [rows, cols]; exact in float32."""
        return unpack_panels(packed, rows, cols, dtype, _decode, words=4, halves=1)

    @staticmethod
    def error_bound(weight: torch.Tensor, importance: torch.Tensor | None = None) -> torch.Tensor:
        """Half the largest possible step, or the distance to the last code, plus two roundings of the scale."""
        groups = grouped(pad_to_tiles(weight))
        ends = [abs(end) for end in (ENDS[:1] if importance is None else ENDS)]
        largest = _largest(groups).unsqueeze(-1)
        long, short = largest.abs() / min(ends) * (1 + REFIT), largest.abs() / max(ends) * (1 - REFIT)
        # Codes reach 8 steps on the largest element's side and 7 on the other; with importance, the sides may be swapped.
        reach = 7 + (groups.sign() == largest.sign()).float() if importance is None else 7
        return ungroup(torch.maximum(long / 2, groups.abs() - reach * short) + 17 * scale_error(long), weight)

    @staticmethod
    def fit(x: torch.Tensor, importance: torch.Tensor) -> Parameters:
        largest = x.gather(0, x.abs().argmax(0, keepdim=True))
        ends = torch.tensor(ENDS, device=x.device, dtype=torch.float32).unsqueeze(1)
        (scale,) = best_of(x, importance, (round_scale(largest / ends),), Int4.codes, Int4.values)
        (fitted,) = Int4.refit(x, Int4.codes(x, (scale,)), importance)
        return best_of(x, importance, (torch.stack((scale, fitted)),), Int4.codes, Int4.values)

    @staticmethod
    def refit(x: torch.Tensor, codes: torch.Tensor, importance: torch.Tensor) -> Parameters:
        return (scale_for(x, codes, importance),)

    @staticmethod
    def codes(x: torch.Tensor, parameters: Parameters) -> torch.Tensor:
        return nearest(x, parameters[0], -8, 7)

    @staticmethod
    def values(codes: torch.Tensor, parameters: Parameters) -> torch.Tensor:
        return codes * parameters[0].float()

    @staticmethod
    def parameters(tiles: torch.Tensor) -> Parameters:
        return read_tiles(tiles, words=4, halves=1)[1]

    @staticmethod
    def tiles(codes: torch.Tensor, parameters: Parameters) -> torch.Tensor:
        words = join_nibbles(to_words(grouped(codes) + 8))
        return tiles_of(words, parameters, Int4.tile_bytes)


def _largest(groups: torch.Tensor) -> torch.Tensor:
    """The element of largest magnitude, signed; the first one in a tie: [n, g, 32] -> [n, g]."""
    high, low = groups.amax(-1), groups.amin(-1)
    largest = torch.where(high >= -low, high, low)  # a NaN is in both, and propagates
    ties = (high == -low).nonzero(as_tuple=True)  # rare; the order of elements matters only here
    if ties[0].numel():
        tied = groups[ties]
        largest[ties] = tied.gather(-1, tied.abs().argmax(-1, keepdim=True)).squeeze(-1)
    return largest


def _encode(panel: torch.Tensor, importance: torch.Tensor | None) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    groups = grouped(panel)
    x = by_column(groups)
    scale = _search(x, _largest(groups), importance)
    q = nearest(x, scale, -8, 7).masked_fill_(~scale.isfinite(), 0.0).add_(8)
    return join_nibbles(to_words(q.permute(1, 2, 0).contiguous())), (scale,)


def _search(x: torch.Tensor, largest: torch.Tensor, importance: torch.Tensor | None) -> torch.Tensor:
    """The best scales, fp16 [n, g], for groups x, float32 [32, n, g]."""
    weights = error_weights(x, importance)
    best = Best()

    def consider(scale: torch.Tensor) -> None:
        best.consider(weighted_error(x, nearest(x, scale, -8, 7), scale, weights), (scale,))

    for end in ENDS[:1] if importance is None else ENDS:
        consider(round_scale(largest / end))
    (scale,) = best.chosen
    consider(_fitted(x, scale, weights))
    return best.chosen[0]


def _fitted(x: torch.Tensor, scale: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """The least-squares scale for the codes that `scale` gives, sum(weights q x) / sum(weights q q), limited by REFIT."""
    old, q = scale.float(), nearest(x, scale, -8, 7)
    wq = weights * q
    return round_scale(old + within(in_order(wq * x) / in_order(wq * q) - old, old.abs() * REFIT))


def _decode(words: torch.Tensor, halves: tuple[torch.Tensor, ...]) -> torch.Tensor:
    return (split_nibbles(words).float() - 8) * halves[0].float().unsqueeze(-1)
