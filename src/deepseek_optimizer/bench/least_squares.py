"""Least squares with coefficients that are not negative."""

from __future__ import annotations

from typing import Any

_NOTHING = 1e-12  # relative; what is below it is rounding


def nonnegative_least_squares(parts: Any, values: Any) -> Any:
    """The x, none below zero, for which the squares of parts @ x - values are least in sum: the active set method of Lawson and
    Hanson (1974, "Solving Least Squares Problems", chapter 23).

    Args:
        parts: float64 [N, P].
        values: float64 [N].

    Returns: float64 [P].
    """
    import numpy as np

    scale = np.sqrt((parts * parts).sum(0))
    scale[scale == 0] = 1.0
    parts = parts / scale
    found, used = np.zeros(parts.shape[1]), np.zeros(parts.shape[1], bool)
    least = _NOTHING * max(1e-300, float(np.abs(parts.T @ values).max()))
    for _ in range(10 * len(found)):  # as many as are ever needed in practice; each one makes the sum smaller
        gradient = np.where(used, 0.0, parts.T @ (values - parts @ found))
        if gradient.max() <= least:
            break
        used[gradient.argmax()] = True
        while True:
            solved = np.zeros(len(found))
            solved[used] = np.linalg.lstsq(parts[:, used], values, rcond=None)[0]
            below = used & (solved <= 0)
            if not below.any():
                found = solved
                break
            # As far towards the solution as none gets below zero; the first that would is then left out.
            reach = np.where(below, found / np.maximum(found - solved, 1e-300), np.inf)
            found = found + reach.min() * (solved - found)
            found[reach.argmin()] = 0.0
            used &= found > 0
            found[~used] = 0.0
            if not used.any():
                break
    return found / scale
