"""The scale search of int4 and q4_1: several candidates per group are tried, and the one with the smallest weighted error wins.

The weight of an element's error is the importance of its column if that is known (the mean square of the activations that the
column is multiplied with, so that the sum is the error of the product), and its own magnitude otherwise. After a format's list
of candidates, the best one is fitted to its codes by least squares. A later candidate must be strictly better: the first is
ggml's, so no group is worse than in ggml, and values that came from a ggml block are packed to the same block.

Sums run over the columns in order, one IEEE operation at a time, so that the native packer gets the same bits
(docs/contracts.md, "Packing, bit for bit").
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from .base import TILE_COLS, Parameters
from .groups import round_scale

REFIT = 1 / 16  # maximum relative change of a scale by a fit: bounds the error of columns whose weight is near zero


def check_importance(importance: torch.Tensor, cols: int) -> None:
    """ValueError unless `importance` is float32 [cols]."""
    if importance.shape != (cols,) or importance.dtype != torch.float32:
        raise ValueError(f"importance must be float32 [{cols}], not {importance.dtype} {tuple(importance.shape)}")


def pad_importance(importance: torch.Tensor | None, cols: int) -> torch.Tensor | None:
    """Pads importance, float32 [cols], with zeros to [ceil32(cols)].

    Raises:
        ValueError: another dtype or shape, or an element that is negative or not finite.
    """
    if importance is None:
        return None
    check_importance(importance, cols)
    if not (importance.isfinite() & (importance >= 0)).all():
        raise ValueError("importance must be finite and not negative")
    return torch.nn.functional.pad(importance, (0, -cols % TILE_COLS))


def by_column(groups: torch.Tensor) -> torch.Tensor:
    """[n, g, 32] -> contiguous [32, n, g]: a column of all groups is contiguous in memory."""
    return groups.permute(2, 0, 1).contiguous()


def error_weights(x: torch.Tensor, importance: torch.Tensor | None) -> torch.Tensor:
    """Weights of the errors of x [32, n, g]: importance [32 g] reshaped to [32, 1, g], or |x| if it is None."""
    return x.abs() if importance is None else importance.view(-1, TILE_COLS).t().unsqueeze(1)


def in_order(terms: torch.Tensor) -> torch.Tensor:
    """Sum of [32, ...] over the first dimension, in ascending order."""
    total = terms[0].clone()
    for term in terms[1:]:
        total += term
    return total


def weighted_error(x: torch.Tensor, q: torch.Tensor, scale: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Sum of weights * (x - scale * q)^2 of each group, [n, g]."""
    difference = x - q * scale.float()
    return in_order(difference.square_().mul_(weights))


def within(value: torch.Tensor, limit: torch.Tensor) -> torch.Tensor:
    """`value` clamped to [-limit, limit]; NaN propagates."""
    return torch.minimum(torch.maximum(value, -limit), limit)


def nearest(x: torch.Tensor, scale: torch.Tensor, low: int, high: int) -> torch.Tensor:
    """rint(x * (1 / scale)) clamped to [low, high], for x [32, n, g] and scale fp16 [n, g]; zeros where the scale is zero."""
    inverse = (1 / scale.float()).masked_fill_(scale == 0, 0.0)
    return (x * inverse).round_().clamp_(low, high)


def scale_for(x: torch.Tensor, codes: torch.Tensor, importance: torch.Tensor) -> torch.Tensor:
    """The least-squares scale of x = scale * codes, fp16 [n]; x, codes: float32 [32, n]; zero where all codes are."""
    weighted = importance.unsqueeze(1) * codes
    return round_scale(((weighted * x).sum(0) / (weighted * codes).sum(0)).nan_to_num_(0.0))


def best_of(
    x: torch.Tensor,
    importance: torch.Tensor,
    candidates: Parameters,
    codes: Callable[[torch.Tensor, Parameters], torch.Tensor],
    values: Callable[[torch.Tensor, Parameters], torch.Tensor],
) -> Parameters:
    """The parameters with the smallest weighted error for groups x, float32 [32, n]; the first ones if errors are equal.

    Unlike `Best`, it computes all errors at once, which is faster for few groups, and in no fixed order.

    Args:
        x: float32 [32, n].
        importance: weights of the errors, float32 [32].
        candidates: fp16 [c, n] each.
        codes, values: of the format, see `GroupFormat`.

    Returns: fp16 [n] each.
    """
    spread = x.unsqueeze(1)
    error = (spread - values(codes(spread, candidates), candidates)).square_()  # [32, c, n]
    total = (importance @ error.flatten(1)).view(error.shape[1:])
    chosen = total.nan_to_num_(torch.inf).argmin(0, keepdim=True)
    return tuple(kind.gather(0, chosen)[0] for kind in candidates)


class Best:
    """The best candidate so far of each group. `chosen`: its fp16 parameters, [n, g] each, the scale first.

    The first candidate is never replaced if its error is NaN or its scale is zero.
    """

    def __init__(self) -> None:
        self._error: torch.Tensor | None = None
        self.chosen: tuple[torch.Tensor, ...] = ()

    def consider(self, error: torch.Tensor, parameters: tuple[torch.Tensor, ...]) -> None:
        """Chooses `parameters` for groups whose error, float32 [n, g], is below the minimum so far; NaN never is."""
        if self._error is None:
            self._error, self.chosen = error.masked_fill(parameters[0] == 0, 0.0), parameters
            return
        better = error < self._error
        self._error = torch.where(better, error, self._error)
        self.chosen = tuple(torch.where(better, new, old) for new, old in zip(parameters, self.chosen, strict=True))
