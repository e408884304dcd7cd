"""Exact verification of drafts: the tokens have the same distribution as if the model had sampled them one by one.

Greedy decoding: a draft is accepted if it is the token that the model would have chosen, so the text is the same.

Sampling: speculative sampling (Leviathan et al. 2023, "Fast Inference from Transformers via Speculative Decoding", algorithm 1;
Chen et al. 2023, "Accelerating Large Language Model Decoding with Speculative Sampling", theorem 1). A draft x sampled from q
is accepted with probability min(1, p(x) / q(x)); instead of the first rejected draft, a token is sampled from max(0, p - q),
normalized. The result has distribution p, the request's distribution after temperature, top-k and all other processors. A
deterministic draft has q(x) = 1: it is accepted with probability p(x); otherwise the token is sampled from p without x.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[Any]


def accept_greedy(drafts: list[int], largest: Callable[[int], int]) -> list[int]:
    """Verifies drafts for greedy decoding; returns the accepted drafts and the model's next token.

    Args:
        drafts: draft tokens.
        largest: j -> the model's token after the first j drafts. Called in order, and only as far as needed.
    """
    tokens = []
    for j in range(len(drafts) + 1):
        tokens.append(largest(j))
        if j < len(drafts) and tokens[j] != drafts[j]:
            break
    return tokens


def accept_sampled(
    drafts: list[int],
    q: list[Any] | None,
    probabilities: Callable[[int], Floats],
    uniform: Callable[[], float],
    draw: Callable[[Floats], int],
) -> list[int]:
    """Verifies drafts for sampling; returns the accepted drafts and one more token.

    Args:
        drafts: draft tokens.
        q: for each draft the distribution [V] it was sampled from; None: all are deterministic.
        probabilities: j -> the model's distribution [V] after the first j drafts. Called in order, and only as far as needed.
        uniform: returns a random number from [0, 1).
        draw: samples an index in proportion to weights [V], which need not sum to one.
    """
    tokens = []
    for j, x in enumerate(drafts):
        p = probabilities(j)
        drawn_from = 1.0 if q is None else float(q[j][x])
        if uniform() * drawn_from < p[x]:
            tokens.append(x)
            continue
        return [*tokens, draw(_rest(p, x, None if q is None else q[j]))]
    return [*tokens, draw(probabilities(len(drafts)))]


def _rest(p: Floats, x: int, q: Floats | None) -> Floats:
    """Returns max(0, p - q), not normalized, for a rejected draft x sampled from q (None: x was deterministic)."""
    if q is None:
        rest = p.copy()
        rest[x] = 0
    else:
        rest = np.maximum(p - q, 0)
    return rest if rest.any() else p  # all zero only if the draft was rejected because of rounding
