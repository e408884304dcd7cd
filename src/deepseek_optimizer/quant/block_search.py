"""The choice of scales and minimums for formats with superblocks and minimums, such as q2_k.

A group's range is covered first, without its outermost eighths, which have few weights; the scale and the minimum are then
fitted to the codes by least squares, twice. Their integers and the superblock's two factors are chosen together: in turns, each
group takes the best of nine pairs of integers (one less, the same, one more), and the factors are fitted to these. Source:
llama.cpp's `make_qkx3_quants` searches in a similar way (ggml-quants.c).

Fits are limited, so that the error of a weight whose importance is 0 is bounded as well: the smallest and the largest value of
a group stay in the outermost quarters of its range, and factors change by an eighth at most.

Columns come first: x is float32 [group, n, G], G groups of n rows, so that sums over a group's columns are sums of contiguous
arrays.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import torch

from .groups import round_scale

TRIM = 1 / 8  # of a group's range, at either end
WIDEST = 2 * TRIM  # what a fit may leave out there
REFIT = 1 / 8  # maximum relative change of a factor
MOST_STEPS = 2  # by which an integer may change
_FITS = 2
_STEPS = (0, -1, 1)  # an integer's change; the first is tried first

Pair = tuple[torch.Tensor, torch.Tensor]


def ranges(x: torch.Tensor, weights: torch.Tensor, top: int) -> Pair:
    """Scales, at least 0, and minimums, at most 0, float32 [n, G], for codes from 0 to `top`, such that the error of x
    [group, n, G] weighted by `weights`, at least 0 and of a shape that broadcasts, is small."""
    low, high = x.amin(0).clamp_max_(0), x.amax(0).clamp_min_(0)
    trim = TRIM * (high - low)
    best = minimum = (low + trim).clamp_max_(0)
    scale = (high - trim - minimum).clamp_min_(0) / top
    found: list[torch.Tensor] = []
    for fits in range(_FITS + 1):
        codes = nearest(x, scale, minimum, top)
        error = _error(x, codes, scale, minimum, weights)
        if not found:
            found = [error, scale, minimum]
        else:
            better = error < found[0]
            found = [torch.where(better, new, old) for new, old in zip((error, scale, minimum), found, strict=True)]
        if fits < _FITS:
            scale, minimum = _within(*_fitted(x, codes, weights), low, high, top)
    _, scale, best = found
    return scale, best


def integers(x: torch.Tensor, weights: torch.Tensor, stored: Pair, factors: Pair, top: int, most: int) -> tuple[Pair, Pair]:
    """Better integers of scales and minimums, and better factors.

    Args:
        x, weights, top: see `ranges`.
        stored: integers of the scales and of the minimums, int8 [n, G], from 0 to `most`.
        factors: fp16 [n, G/s] each, for s groups.
        most: the largest integer.

    Returns: `stored` and `factors` like those given.
    """
    per = stored[0].shape[1] // factors[0].shape[1]
    whole, first = (stored[0].float(), stored[1].float()), factors
    for _ in range(MOST_STEPS):
        spread = [factor.float().repeat_interleave(per, 1) for factor in factors]
        found: list[torch.Tensor] = []
        for scale, minimum in _around(whole, most):
            s, m = scale * spread[0], minimum * spread[1]
            error = _error(x, nearest(x, s, m, top), s, m, weights)
            if not found:
                found = [error, scale, minimum]
                continue
            better = error < found[0]
            found = [torch.where(better, new, old) for new, old in zip((error, scale, minimum), found, strict=True)]
        whole = found[1], found[2]
        codes = nearest(x, whole[0] * spread[0], whole[1] * spread[1], top)
        factors = _fitted_factors(x, codes, weights, whole, first)
    return (whole[0].to(torch.int8), whole[1].to(torch.int8)), factors


def nearest(x: torch.Tensor, scale: torch.Tensor, minimum: torch.Tensor, top: int) -> torch.Tensor:
    """The codes, float32 [group, n, G], whose values scale * code + minimum are nearest to x; zeros where the scale is zero."""
    inverse = (1 / scale).masked_fill_(scale == 0, 0.0)
    return ((x - minimum) * inverse).round_().clamp_(0, top)


def _around(whole: Pair, most: int) -> Iterator[Pair]:
    for scale, minimum in product(_STEPS, _STEPS):
        yield (whole[0] + scale).clamp_(0, most), (whole[1] + minimum).clamp_(0, most)


def _error(
    x: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor, minimum: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    return codes.mul(scale).add_(minimum).sub_(x).square_().mul_(weights).sum(0)


def _fitted(x: torch.Tensor, codes: torch.Tensor, weights: torch.Tensor) -> Pair:
    """Weighted least squares of x = scale * codes + minimum; without a minimum where it would be above 0."""
    total = weights.expand_as(x).sum(0)
    weighted = codes * weights
    mean_q, mean_x = weighted.sum(0) / total, (x * weights).sum(0) / total
    squares, products = (weighted * codes).sum(0), (weighted * x).sum(0)
    scale = (products - total * mean_q * mean_x) / (squares - total * mean_q.square())
    minimum = mean_x - scale * mean_q
    alone = ~(minimum <= 0)
    scale = torch.where(alone, products / squares, scale).nan_to_num_(0.0, 0.0, 0.0).clamp_min_(0)
    return scale, minimum.masked_fill_(alone, 0.0)


def _within(scale: torch.Tensor, minimum: torch.Tensor, low: torch.Tensor, high: torch.Tensor, top: int) -> Pair:
    """The nearest scale and minimum that cover a group's range but for WIDEST at either end."""
    out = WIDEST * (high - low)
    largest = torch.minimum(torch.maximum(minimum + top * scale, high - out), high)
    minimum = torch.minimum(torch.maximum(minimum, low), low + out).clamp_max_(0)
    return (largest - minimum).clamp_min_(0) / top, minimum


def _fitted_factors(x: torch.Tensor, codes: torch.Tensor, weights: torch.Tensor, whole: Pair, first: Pair) -> Pair:
    """Weighted least squares of x = d * (scale * codes) + dmin * minimum over each superblock, rounded to fp16, near the
    first factors; these where there is no such solution."""
    per = whole[0].shape[1] // first[0].shape[1]

    def total(terms: torch.Tensor) -> torch.Tensor:  # [group, n, G] or [n, G], over the superblock's columns
        return (terms.sum(0) if terms.ndim == 3 else terms).unflatten(1, (-1, per)).sum(-1).double()

    q = codes * whole[0]
    weighted = q * weights
    mass, own = weights.expand_as(x).sum(0), weighted.sum(0)
    qq, qm, mm = total(weighted * q), total(own * whole[1]), total(mass * whole[1].square())
    qx, mx = total(weighted * x), total((x * weights).sum(0) * whole[1])
    determinant = qq * mm - qm * qm
    d, dmin = (qx * mm - mx * qm) / determinant, (mx * qq - qx * qm) / determinant
    usable = (determinant > 1e-6 * qq * mm) & d.isfinite() & dmin.isfinite()
    near = [torch.stack([(1 - REFIT) * f.double(), (1 + REFIT) * f.double()]).sort(0).values for f in first]
    fitted = [round_scale(x.clamp(*ends).float()) for x, ends in zip((d, dmin), near, strict=True)]
    return torch.where(usable, fitted[0], first[0]), torch.where(usable, fitted[1], first[1])
