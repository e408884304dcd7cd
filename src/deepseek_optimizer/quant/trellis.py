"""Trellis-coded quantization of groups of 32 weights, as int3 uses it: codes of 3 bits choose among 16 values.

The 16 values, in ascending order, are divided in turn into four subsets of four. A code has two bits u, which choose a value of
a subset, and a bit of the path, a circle h of 32 bits. Two bits that depend on the path choose the subset: for the weight at an
even position t of the circle two bits of h itself, and at an odd position two bits of g, the xor of two rotations of h:

    value[t] = VALUES[4 u[t] + h[t] + 2 h[t + 1]]           t even
    value[t] = VALUES[4 u[t] + g[t - 1] + 2 g[t]]           t odd           g[t] = h[t + 1] ^ h[t - 3]

All positions are modulo 32. So values are closer to each other than with 8 values per weight, and only some of the 16^32
combinations can be stored. The encoder finds the one with the smallest weighted error among them by Viterbi's algorithm, one
run for each state that the circle may start in.

Source: trellis-coded quantization (Marcellin and Fischer 1990), closed to a circle as by Ma and Wolf (1986). The code was found
by trying all of this form with up to 16 states and 3 rotations on normally distributed weights; Ungerboeck's codes (1982) take
more instructions to decode. The values are stretched towards the ends, as suits weights.

All tensors are [32, ...]: column by column, as in `search.py`. Sums run along the circle, one IEEE operation at a time, so that
the native encoder finds the same codes (docs/contracts.md, "Packing, bit for bit").
"""

from __future__ import annotations

from functools import reduce

import torch

from .base import TILE_COLS

VALUES = (-31, -24, -18, -13, -9, -6, -4, -1, 1, 4, 6, 9, 13, 18, 24, 31)
TOP = VALUES[-1]
SHIFTS = (-1, 3)
MEMORY = 4  # bits of the path that make up a state
STATES = 1 << MEMORY
# Position on the circle -> column: 8 positions share a byte of the path's plane (`int3.py`).
COLUMNS = tuple(4 * quad + byte for byte in range(4) for quad in (1, 3, 0, 2, 5, 7, 4, 6))

_LEAD = -min(SHIFTS)  # the encoder is at bit t + LEAD of the path when it chooses the values of positions t and t + 1


def _subsets(before: int, state: int) -> tuple[int, int]:
    """The subsets of an even position and the next, on the way from a state to another, two bits of the path further."""
    window = before << 2 | state & 3  # the latest bit is the lowest

    def bit(back: int) -> int:
        return window >> back + _LEAD & 1

    low, high = (bit(back + SHIFTS[0]) ^ bit(back + SHIFTS[1]) for back in (1, 0))
    return bit(1) + 2 * bit(0), low + 2 * high


_BEFORE = tuple(tuple(state >> 2 | k << MEMORY - 2 for k in range(4)) for state in range(STATES))
_STEPS = tuple(tuple(_subsets(before, state) for before in _BEFORE[state]) for state in range(STATES))


def decode(codes: torch.Tensor) -> torch.Tensor:
    """Returns the values, before scaling, of codes u + 4 h, uint8 [32, ...]: float32 [32, ...]."""
    along = codes[list(COLUMNS)].int()
    table = torch.tensor(VALUES, dtype=torch.float32, device=codes.device)
    values = torch.empty(codes.shape, dtype=torch.float32, device=codes.device)
    values[list(COLUMNS)] = table[4 * (along & 3) + _subsets_along(along >> 2)]
    return values


def encode(y: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Returns the codes u + 4 h of the values closest to y, uint8 [32, n]; the inverse of `decode`.

    Args:
        y: the weights of n groups divided by their scales, float32 [32, n].
        weights: of the squared errors, float32 [32, n] or [32, 1].
    """
    y, weights = y[list(COLUMNS)], weights[list(COLUMNS)]
    costs = [_distances(y, weights, t) for t in range(0, TILE_COLS, 2)]
    path = _trace(costs, _start(costs))
    table = torch.tensor(VALUES, dtype=torch.float32, device=y.device).view(4, 4)  # [u, subset]
    middles = (table[1:] + table[:-1]) / 2
    u = (y > middles[:, _subsets_along(path)]).sum(0)
    codes = torch.empty(y.shape, dtype=torch.uint8, device=y.device)
    codes[list(COLUMNS)] = (u + 4 * path).to(torch.uint8)
    return codes


def least_error(y: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Returns a lower bound of the weighted error of `encode`, float32 [n]: as if the path need not be closed. It takes a
    fraction of the time, and differs by little."""
    y, weights = y[list(COLUMNS)], weights[list(COLUMNS)]
    steps = _index_steps(y.device)
    total = y.new_zeros(STATES, y.shape[1])
    for t in range(0, TILE_COLS, 2):
        total = reduce(torch.minimum, _errors(total, _distances(y, weights, t), steps))
    return total.amin(0)


def _subsets_along(path: torch.Tensor) -> torch.Tensor:
    """The subset of each position, int [32, ...], given the path's bits, int [32, ...]."""
    other = path.roll(SHIFTS[0], 0) ^ path.roll(SHIFTS[1], 0)
    subsets = torch.empty_like(path)
    subsets[0::2] = path[0::2] + 2 * path[1::2]
    subsets[1::2] = other[0::2] + 2 * other[1::2]
    return subsets


def _distances(y: torch.Tensor, weights: torch.Tensor, t: int) -> torch.Tensor:
    """The weighted squared distance of y[t] and y[t + 1] together to the closest values of each pair of subsets, [16, n]."""
    table = torch.tensor(VALUES, dtype=torch.float32, device=y.device).view(4, 4, 1)
    first, second = ((y[i] - table).square_().amin(0).mul_(weights[i]) for i in (t, t + 1))
    return (first.unsqueeze(1) + second).flatten(0, 1)


_Steps = list[tuple[torch.Tensor, torch.Tensor]]


def _index_steps(device: torch.device) -> _Steps:
    """For k = 0..3: the k-th state before each state, and the pair of subsets on the way from there, int64 [states] each."""
    steps = []
    for k in range(4):
        before = torch.tensor([states[k] for states in _BEFORE], dtype=torch.int64, device=device)
        pairs = torch.tensor([4 * step[k][0] + step[k][1] for step in _STEPS], dtype=torch.int64, device=device)
        steps.append((before, pairs))
    return steps


def _errors(total: torch.Tensor, cost: torch.Tensor, steps: _Steps) -> list[torch.Tensor]:
    """Errors of the paths to each state two weights further, by the state before: four of [states, n]."""
    return [total.index_select(0, before) + cost.index_select(0, pair) for before, pair in steps]


def _start(costs: list[torch.Tensor]) -> torch.Tensor:
    """The state in which the best circle begins and ends, int64 [n]; the first in a tie."""
    n, steps = costs[0].shape[1], _index_steps(costs[0].device)
    best, chosen = costs[0].new_empty(n), torch.zeros(n, dtype=torch.int64, device=costs[0].device)
    for state in range(STATES):
        total = costs[0].new_full((STATES, n), torch.inf)
        total[state] = 0
        for cost in costs:
            total = reduce(torch.minimum, _errors(total, cost, steps))
        closed = total[state]
        if state:
            chosen.masked_fill_(closed < best, state)
            best = torch.minimum(closed, best)
        else:
            best = closed
    return chosen


def _trace(costs: list[torch.Tensor], start: torch.Tensor) -> torch.Tensor:
    """The bits of the best path from a state back to it, int32 [32, n]. Of equal errors, the first state before is taken."""
    steps = _index_steps(start.device)
    total = costs[0].new_full((STATES, start.shape[0]), torch.inf)
    total.scatter_(0, start.unsqueeze(0), 0.0)
    origins = []
    for cost in costs:
        total, *others = _errors(total, cost, steps)
        origin = torch.zeros_like(total, dtype=torch.uint8)
        for k, error in enumerate(others, 1):
            origin.masked_fill_(error < total, k)
            total = torch.minimum(error, total)
        origins.append(origin)
    bits, state = [], start
    for origin in reversed(origins):
        bits += [state & 1, state >> 1 & 1]
        state = state >> 2 | origin.gather(0, state.unsqueeze(0)).squeeze(0).long() << MEMORY - 2
    return torch.stack(bits[::-1]).int().roll(_LEAD, 0)
