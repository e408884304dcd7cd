"""Which drafts are accepted, exactly: the tokens are distributed as if the model had been asked for one after the other.

Greedy: a draft holds where it is what the model would have chosen, so the text is the plain text.

Sampled: speculative sampling (Leviathan et al. 2023, "Fast Inference from Transformers via Speculative Decoding", algorithm 1;
Chen et al. 2023, "Accelerating Large Language Model Decoding with Speculative Sampling", theorem 1). A draft x drawn from q is
accepted with probability min(1, p(x) / q(x)); at the first that is not, the token is drawn from max(0, p - q), normalised.
Together that is p. p is what the request samples from: temperature, top-k and all other processors applied. A draft chosen for
certain is one whose q is 1 at x: it is accepted with probability p(x), and else p without x is drawn from.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[Any]


def accept_greedy(drafts: list[int], largest: Callable[[int], int]) -> list[int]:
    """The accepted drafts and the model's own next token.

    Args:
        largest: j -> the model's choice behind the first j drafts. Asked in order, and no further than needed.
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
    """The accepted drafts and one token more.

    Args:
        q: of each draft, the distribution [V] it was drawn from; None: all were chosen for certain.
        probabilities: j -> the model's distribution [V] behind the first j drafts. Asked in order, and no further than needed.
        uniform: a number drawn from [0, 1).
        draw: an index drawn in proportion to weights [V], which need not sum to one.
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
    """max(0, p - q): what p has beyond what a draft x from q covers."""
    if q is None:
        rest = p.copy()
        rest[x] = 0
    else:
        rest = np.maximum(p - q, 0)
    return rest if rest.any() else p  # nothing is left only where rounding alone has refused the draft
