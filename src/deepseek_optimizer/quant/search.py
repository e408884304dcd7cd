"""The search that int4 and q4_1 share: several scales a group, and the one of least weighted error stays.

The weight of an element's error is the importance of its column where that is known (the mean square of what the column is
multiplied with, so that the sum is the error of the product), else its own magnitude. After a format's list of scales, the best
of them is fitted to its codes by least squares. A later choice must be better, not equal: the first is ggml's own, so no
group is worse off than in ggml, and numbers that came out of a ggml block go back to it.

Sums run over the columns in order, one IEEE operation after the other, so that the native packer gets the same bits
(docs/contracts.md, "Packing, bit for bit").
"""

from __future__ import annotations

import torch

from .base import TILE_COLS

REFIT = 1 / 16  # how far a fit may move a scale: bounds the error of columns whose weight is next to nothing


def check_importance(importance: torch.Tensor, cols: int) -> None:
    """Raises: ValueError, unless it is float32 [cols]."""
    if importance.shape != (cols,) or importance.dtype != torch.float32:
        raise ValueError(f"importance must be float32 [{cols}], not {importance.dtype} {tuple(importance.shape)}")


def pad_importance(importance: torch.Tensor | None, cols: int) -> torch.Tensor | None:
    """Importance float32 [cols] -> [ceil32(cols)], zeros past the end; ValueError for another shape, or what is no weight."""
    if importance is None:
        return None
    check_importance(importance, cols)
    if not (importance.isfinite() & (importance >= 0)).all():
        raise ValueError("importance must be finite and not negative")
    return torch.nn.functional.pad(importance, (0, -cols % TILE_COLS))


def by_column(groups: torch.Tensor) -> torch.Tensor:
    """[n, g, 32] -> contiguous [32, n, g]: one column of all groups is one stretch of memory."""
    return groups.permute(2, 0, 1).contiguous()


def error_weights(x: torch.Tensor, importance: torch.Tensor | None) -> torch.Tensor:
    """Weights of the errors of x [32, n, g]: importance [32 g] as [32, 1, g], or |x|."""
    return x.abs() if importance is None else importance.view(-1, TILE_COLS).t().unsqueeze(1)


def in_order(terms: torch.Tensor) -> torch.Tensor:
    """Sum of [32, ...] over the first dimension, ascending."""
    total = terms[0].clone()
    for term in terms[1:]:
        total += term
    return total


def weighted_error(x: torch.Tensor, q: torch.Tensor, scale: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Sum of weights * (x - scale * q)^2 of each group, [n, g]."""
    difference = x - q * scale.float()
    return in_order(difference.square_().mul_(weights))


def within(value: torch.Tensor, limit: torch.Tensor) -> torch.Tensor:
    """`value` clamped to +-limit; NaN stays."""
    return torch.minimum(torch.maximum(value, -limit), limit)


def nearest(x: torch.Tensor, scale: torch.Tensor, low: int, high: int) -> torch.Tensor:
    """rint(x * (1 / scale)) clamped to [low, high], for x [32, n, g] and scale fp16 [n, g]; zeros where the scale is zero."""
    inverse = (1 / scale.float()).masked_fill_(scale == 0, 0.0)
    return (x * inverse).round_().clamp_(low, high)


class Best:
    """The best choice so far, group by group; `chosen`: its fp16 numbers, [n, g] each, the scale first.

    The first choice stays where it is broken (its error is NaN) or its scale is zero.
    """

    def __init__(self) -> None:
        self._error: torch.Tensor | None = None
        self.chosen: tuple[torch.Tensor, ...] = ()

    def consider(self, error: torch.Tensor, numbers: tuple[torch.Tensor, ...]) -> None:
        """Takes `numbers` where their error, float32 [n, g], is less than the least so far; NaN is not."""
        if self._error is None:
            self._error, self.chosen = error.masked_fill(numbers[0] == 0, 0.0), numbers
            return
        better = error < self._error
        self._error = torch.where(better, error, self._error)
        self.chosen = tuple(torch.where(better, new, old) for new, old in zip(numbers, self.chosen, strict=True))
