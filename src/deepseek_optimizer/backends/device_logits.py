"""Rows of logits on a device: changed before tokens are chosen, and the log probabilities of tokens.

What crosses to the device are the changed tokens, and what comes back are numbers of single tokens. The definitions are
`sampling.apply_changes`, with the same bits, and `sampling.log_probability`, whose exponentials have other last bits here.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from .sampling import Change


def changed_logits(logits: torch.Tensor, rows: Sequence[int], changes: Sequence[Sequence[Change]]) -> torch.Tensor:
    """Copies of some rows, changed: float32 [n, V] on the device of the logits.

    Args:
        logits: float32 [R, V].
        rows: n indices of rows.
        changes: of each of these rows, in their order.
    """
    result = logits[list(rows)]
    flat, width = result.view(-1), logits.shape[1]
    for stage in range(max(map(len, changes), default=0)):  # the first changes of all rows at once, then the second ones
        own = [(row, of_row[stage]) for row, of_row in enumerate(changes) if len(of_row) > stage]
        factors = [np.full(len(c.tokens), c.factor, np.float32) for _, c in own]
        added = [np.zeros(len(c.tokens), np.float32) if c.added is None else c.added for _, c in own]
        places = _uploaded(np.concatenate([row * width + c.tokens for row, c in own]), logits)
        values = flat[places]
        if any(c.factor != 1 for _, c in own):
            factor = _uploaded(np.concatenate(factors), logits)
            values = torch.where(values < 0, values * factor, values / factor)
        if any(c.added is not None for _, c in own):
            values = values + _uploaded(np.concatenate(added), logits)
        flat[places] = values
    return result


def log_probabilities(
    logits: torch.Tensor, tokens: Sequence[tuple[int, int, int]]
) -> list[tuple[float, tuple[tuple[int, float], ...]]]:
    """Log probabilities of chosen tokens and of the likeliest ones.

    Args:
        logits: float32 [R, V].
        tokens: (row, token, number of the likeliest tokens) of each.

    Returns: for each its log probability, and (token, log probability) of the likeliest ones, best first (ties: the lower id).
    """
    own, most = logits[[row for row, _, _ in tokens]], max(count for _, _, count in tokens)
    chosen = torch.tensor([token for _, token, _ in tokens], dtype=torch.int64, device=logits.device)[:, None]
    largest = own.amax(1, keepdim=True)
    total = torch.exp(own - largest).sum(1, keepdim=True, dtype=torch.float64)
    ids = chosen
    if most:
        ids = torch.cat((chosen, own.sort(dim=1, descending=True, stable=True)[1][:, :most]), 1)
    values = own.gather(1, ids).double() - largest.double() - total.log()
    both = torch.cat((ids.double(), values), 1).tolist()  # ids are exact in fp64; one copy to the host
    result = []
    for row, (_, _, count) in zip(both, tokens, strict=True):
        half = len(row) // 2
        top = zip(map(int, row[1 : 1 + count]), row[half + 1 : half + 1 + count], strict=True)
        result.append((row[half], tuple(top)))
    return result


def _uploaded(values: np.ndarray, like: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(values).to(like.device)
