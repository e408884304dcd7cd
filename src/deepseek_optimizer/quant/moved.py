"""Rounds weights that moved away from a rounded matrix, such that they get its codes and parameters where they did not move.

Packing would choose the parameters of a group anew, from the weights alone. Error-compensated rounding chose them, and the
codes, by more than the weights (`compensation.py`), so that packing its values would not give them back.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from .base import TILE_COLS, TILE_ROWS, GroupFormat, Parameters
from .groups import grouped
from .search import by_column
from .tiles import pad_to_tiles, panels

ROUNDS = 2  # of codes for given parameters, then parameters for these codes
SHARE = 0.8  # of the way to the next code that a weight is at most away from its value, see `start`


TRIED = (0.25, 0.5, 0.75, 1.0)  # of the way to the original, see `between`


def between(original: torch.Tensor, values: torch.Tensor, rounded: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """Weights on the way from the values of a rounded matrix to the original ones: each group SHARE of the way on which it
    still rounds to the same values.

    Args:
        original, values: float32 [N, K].
        rounded: rounds such a matrix.
    """
    result, padding = values, (0, -values.shape[1] % TILE_COLS)
    for way in TRIED:
        end = torch.lerp(values, original, way)
        changed = torch.nn.functional.pad(rounded(end) != values, padding).unflatten(1, (-1, TILE_COLS)).any(-1)
        kept = ~changed.repeat_interleave(TILE_COLS, 1)[:, : values.shape[1]]
        result = torch.where(kept, torch.lerp(values, original, SHARE * way), result)
    return result


class MovedMatrix:
    """Rounds the successors of a rounded matrix. It depends on nothing but the weights and that matrix.

    Args:
        format: the format of the matrix.
        parameters: of the rounded matrix, [ceil16(N), ceil(K/32)] each; any rows beyond N are not used.
    """

    def __init__(self, format: GroupFormat, parameters: Parameters) -> None:
        self._format, self.parameters = format, parameters

    def rounded(self, weight: torch.Tensor, out: torch.Tensor) -> None:
        """Writes the values of the codes for weights, float [N, K], to `out`, float [N, K]."""
        for begin, end in panels(*weight.shape):
            x, parameters, shape = self._groups(weight[begin:end], begin)
            codes, parameters = self._near(x, parameters)
            values = self._format.values(codes, parameters).view(TILE_COLS, *shape).permute(1, 2, 0).flatten(1)
            out[begin:end] = values[: end - begin, : weight.shape[1]]

    def start(self, original: torch.Tensor, out: torch.Tensor) -> None:
        """Moves the values of the rounded matrix, `out` float [N, K], towards the weights that it was rounded from, such that
        they still round to it. Where training wants another code, the weight then reaches it sooner."""
        for begin, end in panels(*out.shape):
            values, parameters, shape = self._groups(out[begin:end], begin)
            codes = self._format.codes(values, parameters)
            limit = parameters[0].float().abs() / 2
            moved = values + SHARE * torch.clamp(self._groups(original[begin:end], begin)[0] - values, -limit, limit)
            # What changes the parameters that fit best is left out.
            moved -= self._format.values(codes, self._fitted(moved, codes, parameters)) - values
            kept = (self._near(moved, parameters)[0] == codes).all(0)
            if out.shape[1] % TILE_COLS:  # the padding cannot move along
                kept[shape[1] - 1 :: shape[1]] = False
            moved = torch.where(kept, moved, values).view(TILE_COLS, *shape).permute(1, 2, 0).flatten(1)
            out[begin:end] = moved[: end - begin, : out.shape[1]]

    def tiles(self, weight: torch.Tensor, out: torch.Tensor) -> None:
        """Writes the tiles of weights, float [N, K], to `out`, uint8 [ceil(N/16), ceil(K/32), tile_bytes]."""
        for begin, end in panels(*weight.shape):
            x, parameters, shape = self._groups(weight[begin:end], begin)
            codes, parameters = self._near(x, parameters)
            rows = codes.view(TILE_COLS, *shape).permute(1, 2, 0).flatten(1).to(torch.int16).contiguous()
            to = out[begin // TILE_ROWS : -(-end // TILE_ROWS)]
            to.copy_(self._format.tiles(rows, tuple(kind.view(shape) for kind in parameters)))

    def _near(self, x: torch.Tensor, parameters: Parameters) -> tuple[torch.Tensor, Parameters]:
        """Codes, float32 [32, n], and parameters of groups x, float32 [32, n], that had the given parameters."""
        codes = x
        for _ in range(ROUNDS):
            codes = self._format.codes(x, parameters)
            parameters = self._fitted(x, codes, parameters)
        return codes, parameters

    def _fitted(self, x: torch.Tensor, codes: torch.Tensor, parameters: Parameters) -> Parameters:
        """The parameters that fit codes best; where all codes are the same, those that are given."""
        fitted = self._format.refit(x, codes, torch.ones(TILE_COLS, dtype=torch.float32, device=x.device))
        usable = fitted[0].isfinite() & (fitted[0] != 0)
        return tuple(torch.where(usable, new, old) for new, old in zip(fitted, parameters, strict=True))

    def _groups(self, panel: torch.Tensor, begin: int) -> tuple[torch.Tensor, Parameters, tuple[int, int]]:
        """The groups of rows from `begin` on, float32 [32, n g], their parameters before they moved, and n and g."""
        x = by_column(grouped(pad_to_tiles(panel.detach())))
        shape = (x.shape[1], x.shape[2])
        x = x.flatten(1)
        parameters = tuple(kind[begin : begin + shape[0]].flatten() for kind in self.parameters)
        if tail := panel.shape[1] % TILE_COLS:  # the padding must not count: it gets values that are exact
            last = slice(shape[1] - 1, None, shape[1])
            ends = tuple(kind[last] for kind in parameters)
            x[tail:, last] = self._format.values(self._format.codes(x[tail:, last], ends), ends)
        return x, parameters, shape
