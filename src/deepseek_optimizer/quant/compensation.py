"""Error-compensated rounding: the error of each column is compensated by the columns that are rounded after it.

The rounding error of a matrix W [N, K] matters as far as it changes the product: tr((W - Q) H (W - Q)^T), where H is the
second moment of the inputs. With H = (I + F) D (I + F)^T, F strictly upper triangular and D diagonal, the columns are rounded
in order:

    q_k = round(w_k + sum over i < k of (w_i - q_i) F_ik)

The error of the product is then the sum over k of D_k times the square of what this rounding alone changed. This is LDLQ
(Chee et al. 2023, "QuIP"), which computes the same codes as GPTQ (Frantar et al. 2022). The parameters of a group of 32 columns
are chosen when its first column is reached, for errors weighted by D. The 32 codes of a group of int3 depend on each other, so
they are chosen together (D then has blocks of 32 columns, of which the weights are the diagonals).

Sweeps over the groups follow. Each chooses the parameters and codes of one group again, now that those of all other groups are
known, and keeps them in the rows in which the error of the product becomes smaller (block coordinate descent).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch

from .base import TILE_COLS, CodedGroups, GroupFormat, Packer, Parameters, WholeGroups

DAMPING = 0.01  # is added to the diagonal of H, relative to its mean: as in GPTQ
SWEEPS = 1
ROWS = 4096  # are rounded at a time: bounds the memory for a matrix of many rows


@dataclass(frozen=True)
class Curvature:
    """How an error in the columns of a matrix changes its product.

    Attributes:
        second_moment: H, damped, with a mean diagonal of 1 + damping, [K, K].
        feedback: F, [K, K]: zero on and below the diagonal of runs of columns that are rounded together.
        weights: the diagonal of D, [K].
    """

    second_moment: torch.Tensor
    feedback: torch.Tensor
    weights: torch.Tensor

    def to(self, dtype: torch.dtype) -> Curvature:
        return Curvature(self.second_moment.to(dtype), self.feedback.to(dtype), self.weights.to(dtype))


@dataclass(frozen=True)
class Rounded:
    """A rounded matrix: codes int16 [N, K] and the parameters of its groups, [N, K/32] each."""

    codes: torch.Tensor
    parameters: Parameters

    def values(self, format: CodedGroups) -> torch.Tensor:
        """float32 [N, K]."""
        groups = range(self.codes.shape[1] // TILE_COLS)
        columns = self.codes.t().float()
        return torch.cat([format.values(columns[_columns(g)], tuple(p[:, g] for p in self.parameters)) for g in groups]).t()


def curvature(second_moment: torch.Tensor, run: int = 1, damping: float = DAMPING) -> Curvature:
    """Factors the second moment of a matrix's inputs.

    Args:
        second_moment: sum of x x^T over the inputs, float [K, K], with K a multiple of 32; its dtype is that of the result.
        run: see `GroupFormat`.
        damping: is added to the diagonal, relative to its mean.
    """
    h = second_moment / second_moment.diagonal().mean().clamp_min(torch.finfo(second_moment.dtype).tiny)
    h.diagonal().add_(damping)
    return Curvature(h, *_factored(h, run))


def _factored(h: torch.Tensor, run: int) -> tuple[torch.Tensor, torch.Tensor]:
    """F [..., K, K] and the diagonal of D [..., K] of H = (I + F) D (I + F)^T; D has blocks of `run` columns."""
    upper = torch.linalg.cholesky(h.flip(-1, -2)).flip(-1, -2)  # h = upper @ upper^T
    blocks = upper.unflatten(-2, (-1, run)).unflatten(-1, (-1, run)).diagonal(dim1=-4, dim2=-2).movedim(-1, -3)
    columns = upper.unflatten(-1, (-1, run)).transpose(-3, -2)  # [..., K / run, K, run]
    unit = columns / blocks if run == 1 else torch.linalg.solve_triangular(blocks, columns, upper=True, left=False)
    feedback = unit.transpose(-3, -2).flatten(-2)
    feedback.diagonal(dim1=-2, dim2=-1).sub_(1)
    return feedback, blocks.square().sum(-1).flatten(-2)


def compensated(
    weight: torch.Tensor,
    curvature: Curvature,
    format: GroupFormat | WholeGroups,
    sweeps: int = SWEEPS,
    packer: Packer | None = None,
) -> Rounded:
    """Rounds a matrix such that the error of its product is small.

    Args:
        weight: float [N, K], with K a multiple of 32.
        curvature: of its inputs; computed for the format's `run`.
        format: the format.
        sweeps: number of sweeps that improve the result.
        packer: packs the format; needed for `WholeGroups`.
    """
    groups = _groups(curvature, format.run)
    dtype = curvature.feedback.dtype
    choose = _Choice(format, packer)
    parts = [_rounded_rows(rows.to(dtype), curvature, groups, choose, sweeps) for rows in weight.split(ROWS)]
    columns = zip(*(part.parameters for part in parts), strict=True)
    return Rounded(torch.cat([part.codes for part in parts]), tuple(torch.cat(column) for column in columns))


def with_product(weight: torch.Tensor, wanted: torch.Tensor, curvature: Curvature) -> torch.Tensor:
    """The matrix M whose products M y are closest to W y + d, for a wanted change d of the products; M is what to round then.

    M = W + E[d y^T] H^-1, with H the damped second moment of y, so that noise changes W little.

    Args:
        weight: W, float [N, K].
        wanted: sum of d y^T over the inputs, divided by the mean diagonal of the sum of y y^T, [N, K].
        curvature: of y.
    """
    change = torch.linalg.solve(curvature.second_moment, wanted.t().to(curvature.second_moment.dtype))
    return weight + change.t().to(weight.dtype)


def product_error(weight: torch.Tensor, values: torch.Tensor, curvature: Curvature) -> torch.Tensor:
    """(w - v) H (w - v)^T of each row, [N]."""
    error = weight.to(curvature.second_moment.dtype) - values
    return ((error @ curvature.second_moment) * error).sum(-1)


class _Choice:
    """Chooses the parameters, codes and values of a group, for either kind of format."""

    def __init__(self, format: GroupFormat | WholeGroups, packer: Packer | None) -> None:
        self.format, self._packer = format, packer

    def __call__(
        self, target: torch.Tensor, weights: torch.Tensor, feedback: torch.Tensor, kept: torch.Tensor | None = None
    ) -> tuple[Parameters, torch.Tensor, torch.Tensor]:
        """Rounds a group [32, N]; weights and feedback are those within it; `kept`: its codes so far, if it has any."""
        if isinstance(self.format, WholeGroups):
            assert self._packer is not None
            codes, parameters = self.format.rounded(target.float(), weights.float(), self._packer)
            return parameters, codes, self.format.values(codes, parameters).to(target.dtype)
        fit = self.format.fit if kept is None else partial(self.format.refit, codes=kept)
        parameters = fit(target.float(), importance=weights.float())
        return parameters, *_rounded_group(target, parameters, feedback, self.format)


def _rounded_rows(weight: torch.Tensor, c: Curvature, groups: list[_Group], choose: _Choice, sweeps: int) -> Rounded:
    columns = weight.t().contiguous()  # [K, N]: the operations on one column of all rows are contiguous
    codes, error = torch.empty_like(columns, dtype=torch.int16), torch.empty_like(columns)
    chosen = []
    for group in range(len(columns) // TILE_COLS):
        here = _columns(group)
        inner = c.feedback[here, here]
        # The best values of this group for the errors so far: what it would be changed to if it were not rounded.
        change = c.feedback[: here.start, here].t() @ error[: here.start]
        target = columns[here] + torch.linalg.solve_triangular(inner.t(), change, upper=False, unitriangular=True)
        parameters, codes[here], values = choose(target, c.weights[here], inner)
        error[here] = columns[here] - values
        chosen.append(parameters)
    for _ in range(sweeps):
        _sweep(codes, error, chosen, c, groups, choose)
    return Rounded(codes.t().contiguous(), tuple(torch.stack(kind, 1) for kind in zip(*chosen, strict=True)))


def _rounded_group(
    target: torch.Tensor, parameters: Parameters, feedback: torch.Tensor, format: GroupFormat
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rounds one group [32, N] column by column; `feedback` is that within the group. Returns codes and values."""
    parameters = tuple(half.float() for half in parameters)  # once, not for every column
    codes, values, error = (torch.empty_like(target) for _ in range(3))
    for k in range(0, TILE_COLS, format.run):
        now = slice(k, k + format.run)
        wanted = target[now] + feedback[:k, now].t() @ error[:k]
        codes[now] = format.codes(wanted.float(), parameters)
        values[now] = format.values(codes[now].float(), parameters)
        error[now] = target[now] - values[now]
    return codes, values


@dataclass(frozen=True)
class _Group:
    """The block of H that belongs to one group, [32, 32], its inverse, and its factors as in `Curvature`."""

    second_moment: torch.Tensor
    inverse: torch.Tensor
    feedback: torch.Tensor
    weights: torch.Tensor


def _groups(c: Curvature, run: int) -> list[_Group]:
    blocks = c.second_moment.unflatten(0, (-1, TILE_COLS)).unflatten(2, (-1, TILE_COLS)).diagonal(dim1=0, dim2=2).movedim(-1, 0)
    return [_Group(*parts) for parts in zip(blocks, torch.linalg.inv(blocks), *_factored(blocks, run), strict=True)]


def _sweep(
    codes: torch.Tensor,
    error: torch.Tensor,
    chosen: list[Parameters],
    c: Curvature,
    groups: list[_Group],
    choose: _Choice,
) -> None:
    """Chooses every group again, given the others. Modifies codes int16 [K, N], error [K, N] = W - Q, and the parameters."""
    for i, (group, old) in enumerate(zip(groups, chosen, strict=True)):
        here = _columns(i)
        # The error of the product is that of (target - values) by the group's block of H, plus what this group cannot change.
        distance = group.inverse @ (c.second_moment[here] @ error)
        kept = codes[here].float()
        values = choose.format.values(kept, old)
        target = values + distance
        parameters, tried, new_values = choose(target, group.weights, group.feedback, kept)
        left = target - new_values
        better = ((group.second_moment @ left) * left).sum(0) < ((group.second_moment @ distance) * distance).sum(0)
        codes[here] = torch.where(better, tried.to(codes.dtype), codes[here])
        error[here] += torch.where(better, values - new_values, 0)
        chosen[i] = tuple(torch.where(better, new, kept) for new, kept in zip(parameters, old, strict=True))


def _columns(group: int) -> slice:
    return slice(group * TILE_COLS, (group + 1) * TILE_COLS)
