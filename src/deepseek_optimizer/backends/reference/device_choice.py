"""Chooses tokens on the device of the logits, by `sampling.choose_token`, so that only tokens are copied to the host.

Exponentials and long sums have other last bits on a device than in numpy. So each comparison that depends on them is made with
a margin that covers the error of both, and a token is chosen only if no result within the margin gives another one. What is
left is chosen on the host, by the definition; the flatter a distribution, the more. Everything else (divisions by the
temperature, bounds, the order of equal logits) is exact.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from ..sampling import LANES, NOT_FINITE, TokenChoice, choose_token

UNDECIDED = -2  # instead of a token: it is chosen on the host
_MARGIN = 2e-6  # of a sum: fp32 exponentials are within 2.52 ulp in numpy and 2 ulp in CUDA, 6e-7 together; sums are fp64
_FOLDED_MARGIN = 7e-6  # of a sum of columns, which numpy adds in fp32, 64 numbers each
_RATIO_MARGIN = 5e-6  # of a weight
_FEW = 1024  # up to this top_k, the largest logits are selected instead of sorting all
_BYTES = 512 << 20  # of temporary tensors
_ROW_BYTES = 64  # of them for each logit: sorted values and ids, weights, sums


def greedy_tokens(logits: torch.Tensor) -> torch.Tensor:
    """What `sampling.choose_token` returns for each row without sampling, on the device of the logits."""
    largest, tokens = logits.max(-1)
    return torch.where(largest.isfinite(), tokens, NOT_FINITE)


def choose_on_device(
    logits: torch.Tensor, choices: Sequence[TokenChoice | None], greedy: list[int] | None = None
) -> list[int | None]:
    """See `Plan.choose_tokens`. Tokens are copied to the host at once; of the logits, only rows that are UNDECIDED.

    Args:
        logits, choices: as there.
        greedy: `greedy_tokens` of the logits, if they are on the host already.
    """
    rows = [row for row, choice in enumerate(choices) if choice is not None and choice.temperature != 0]
    found = []
    if greedy is None:
        found.append(greedy_tokens(logits))
    if rows:
        found.append(
            drawn_tokens(logits[rows], [choice for choice in choices if choice is not None and choice.temperature != 0])
        )
    tokens = torch.cat(found).tolist() if found else []
    likeliest = tokens[: len(logits)] if greedy is None else greedy
    chosen: list[int | None] = [None if choice is None else likeliest[row] for row, choice in enumerate(choices)]
    for row, token in zip(rows, tokens[len(tokens) - len(rows) :], strict=True):
        if likeliest[row] != NOT_FINITE:
            choice = choices[row]
            assert choice is not None
            chosen[row] = choose_token(logits[row].cpu().numpy(), choice) if token == UNDECIDED else token
    return chosen


def drawn_tokens(logits: torch.Tensor, choices: Sequence[TokenChoice]) -> torch.Tensor:
    """The token of each row that is sampled, or UNDECIDED: int64 [R] on the device of the logits.

    Args:
        logits: float32 [R, V]; the largest of a row is finite, or its result has no meaning.
        choices: one per row, with a temperature above 0.
    """
    at_once = max(1, _BYTES // (_ROW_BYTES * logits.shape[1]))
    tokens = logits.new_full((len(choices),), UNDECIDED, dtype=torch.int64)
    for plain in (True, False):
        rows = [row for row, c in enumerate(choices) if plain == (not c.top_k and c.top_p == 1 and not c.min_p)]
        for begin in range(0, len(rows), at_once):
            part = rows[begin : begin + at_once]
            own = [choices[row] for row in part]
            scaled = logits[part] / _column(logits, [np.float32(c.temperature) for c in own], torch.float32)
            tokens[part] = (_draw_unfiltered if plain else _draw_filtered)(scaled, own)
    return tokens


def _draw_unfiltered(scaled: torch.Tensor, choices: Sequence[TokenChoice]) -> torch.Tensor:
    """As `sampling._draw_unfiltered`: a column of the folded vocabulary by its sum, then a token of it."""
    count, size = scaled.shape
    columns = -(-size // LANES)
    weights = torch.nn.functional.pad(torch.exp(scaled - scaled.amax(1, keepdim=True)), (0, columns * LANES - size))
    table = weights.view(count, LANES, columns)
    sums = table.sum(1, dtype=torch.float64).cumsum(1)
    target = _column(scaled, [c.u for c in choices], torch.float64) * sums[:, -1:]
    column = (sums <= target).sum(1, keepdim=True).clamp(max=columns - 1)
    before = torch.where(column > 0, sums.gather(1, (column - 1).clamp(min=0)), 0.0)
    inside = before + table.gather(2, column[:, None].expand(-1, LANES, 1))[..., 0].double().cumsum(1)
    lane = (inside <= target).sum(1, keepdim=True).clamp(max=LANES - 1)
    margin = _FOLDED_MARGIN * sums[:, -1:]
    lower = torch.where(lane > 0, inside.gather(1, (lane - 1).clamp(min=0)), before)
    certain = (lower < target - margin) | ((lane == 0) & (column == 0))
    certain &= inside.gather(1, lane) > target + margin
    return torch.where(certain, lane * columns + column, UNDECIDED)[:, 0]


def _draw_filtered(scaled: torch.Tensor, choices: Sequence[TokenChoice]) -> torch.Tensor:
    """As `sampling.filtered` and `draw_from`."""
    size = scaled.shape[1]
    top_k = _column(scaled, [min(c.top_k or size, size) for c in choices], torch.int64)
    by_count = _column(scaled, [c.top_k > 0 for c in choices], torch.bool)
    top_p = _column(scaled, [c.top_p for c in choices], torch.float64)
    min_p = _column(scaled, [np.float32(c.min_p) for c in choices], torch.float64)
    values, tokens, complete = _largest(scaled, choices, top_k)
    top = values[:, :1]
    rank = torch.arange(values.shape[1], device=values.device, dtype=torch.int64)
    able = (values >= _bounds(top, choices, size)) & values.isfinite() & (rank < top_k)
    weights = torch.where(able, torch.exp(values - top), 0.0).double()
    sums = weights.cumsum(1)
    total = torch.where(by_count, sums[:, -1:], torch.exp(scaled - top).sum(1, keepdim=True, dtype=torch.float64))
    margin, before = _MARGIN * total, sums - weights
    by_sum, head, first = torch.where(top_p < 1, top_p * total, torch.inf), rank == 0, values == top
    surely = able & ((before < by_sum - margin) | head) & (first | (weights > min_p * (1 + _RATIO_MARGIN)))
    perhaps = able & ((before < by_sum + margin) | head) & (first | (weights >= min_p * (1 - _RATIO_MARGIN)))
    every = (weights * perhaps).sum(1, keepdim=True)
    slack, u = _MARGIN * every, _column(scaled, [c.u for c in choices], torch.float64)
    place = (sums <= u * (weights * surely).sum(1, keepdim=True) - slack).sum(1, keepdim=True).clamp(max=values.shape[1] - 1)
    certain = surely.gather(1, place) & (sums.gather(1, place) > u * every + slack) & complete
    return torch.where(certain, tokens.gather(1, place), UNDECIDED)[:, 0]


def _largest(
    scaled: torch.Tensor, choices: Sequence[TokenChoice], top_k: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The largest logits of each row, at least `top_k` of them, in descending order (ties: the lower id first), their tokens,
    and whether they are certainly the right ones, [R, 1]."""
    most = max(c.top_k or scaled.shape[1] for c in choices)
    if most > _FEW or most >= scaled.shape[1]:
        values, tokens = scaled.sort(dim=1, descending=True, stable=True)
        return values, tokens, torch.ones_like(top_k, dtype=torch.bool)
    values, tokens = scaled.topk(most + 1, dim=1)  # of equal logits at the end, any may be missing
    tokens, order = tokens.sort(dim=1)
    values, order = values.gather(1, order).sort(dim=1, descending=True, stable=True)
    return values, tokens.gather(1, order), values.gather(1, top_k - 1) != values[:, -1:]


def _bounds(top: torch.Tensor, choices: Sequence[TokenChoice], size: int) -> torch.Tensor:
    """The bounds of `sampling._candidates` without that of top_k, float32 [R, 1]."""
    by_sum = [np.log((1 - c.top_p) / size) if c.top_p < 1 else -np.inf for c in choices]
    by_weight = [np.log(c.min_p) if c.min_p else -np.inf for c in choices]
    of_sum, of_weight = (top.double() + _column(top, values, torch.float64) for values in (by_sum, by_weight))
    return torch.maximum(of_sum, of_weight - 1e-4).float()


def _column(like: torch.Tensor, values: Sequence[float | np.float32], dtype: torch.dtype) -> torch.Tensor:
    """[R, 1] on the device of a tensor."""
    return torch.tensor(values, dtype=dtype, device=like.device)[:, None]
