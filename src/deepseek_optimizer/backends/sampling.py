"""How a token is chosen from a row of logits, in numpy: the definition that every backend's `Plan.choose_tokens` follows.

The filters are those of Transformers (`TemperatureLogitsWarper`, `TopKLogitsWarper`, `TopPLogitsWarper`, `MinPLogitsWarper`),
in that order. Sorting a whole vocabulary takes longer than the rest of a small model's step, so only tokens that can pass the
filters are sorted. No torch.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]
NOT_FINITE = -1  # in place of a token: the row's largest logit is NaN or infinite
_LANES = 64  # rows that a vocabulary is folded into, to look at its maxima and sums first


class Filters(Protocol):
    """Temperature (above 0) and the filters; the defaults of `TokenChoice` filter nothing."""

    @property
    def temperature(self) -> float: ...

    @property
    def top_k(self) -> int: ...

    @property
    def top_p(self) -> float: ...

    @property
    def min_p(self) -> float: ...


class TokenChoice(NamedTuple):
    """How one row's token is chosen.

    Attributes:
        temperature: 0: the largest logit, the first of equals; the other fields are not read then.
        top_k: 0: all. top_p in (0, 1]. min_p in [0, 1]: of the likeliest token's probability.
        u: a number from [0, 1) that selects the token of the filtered distribution, see `draw`.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    u: float = 0.0


GREEDY = TokenChoice()


def choose_token(logits: Floats, choice: TokenChoice) -> int:
    """The token that `choice` takes from float32 logits [V]; NOT_FINITE where they are not all numbers."""
    token = int(logits.argmax())
    if not np.isfinite(logits[token]):
        return NOT_FINITE
    return token if choice.temperature == 0 else draw(logits, choice, choice.u)


def choose_tokens(logits: Floats, choices: Sequence[TokenChoice | None]) -> list[int | None]:
    """`choose_token` of each row of float32 logits [R, V]; None where its choice is None."""
    return [None if choice is None else choose_token(row, choice) for row, choice in zip(logits, choices, strict=True)]


def uniform(seed: int, place: int) -> float:
    """A number in [0, 1) that belongs to a seed and a place in the text: the same whatever was drawn before it."""
    digest = hashlib.blake2b(struct.pack("<QQ", seed, place), digest_size=8).digest()
    return float(int.from_bytes(digest, "little") >> 11) / (1 << 53)


def draw(logits: Floats, sampling: Filters, u: float) -> int:
    """A token from the filtered distribution.

    Args:
        logits: [V], penalties and masks in; at least one is finite.
        u: from [0, 1).
    """
    scaled = logits / np.float32(sampling.temperature)
    if sampling.top_k or sampling.top_p < 1 or sampling.min_p:
        tokens, weights = filtered(scaled, sampling)
        return int(tokens[_place(np.cumsum(weights, dtype=np.float64), u)])
    return _drawn_of_all(scaled, u)


def filtered(scaled: Floats, sampling: Filters) -> tuple[Ints, Floats]:
    """What the filters let through: tokens, likeliest first (of equals the lower number), and their weights [n]: not divided by
    their sum.

    Args:
        scaled: logits over temperature, [V].
    """
    tokens = _candidates(scaled, sampling)
    weights = np.exp(scaled[tokens] - scaled[tokens[0]])
    if sampling.top_p < 1:
        before = np.cumsum(weights, dtype=np.float64)
        total = before[-1] if sampling.top_k else np.exp(scaled - scaled[tokens[0]]).sum(dtype=np.float64)
        keep = 1 + int(np.searchsorted(before[:-1], sampling.top_p * total))
        tokens, weights = tokens[:keep], weights[:keep]
    if sampling.min_p:
        keep = int(np.count_nonzero(weights >= np.float32(sampling.min_p)))
        tokens, weights = tokens[:keep], weights[:keep]
    return tokens, weights


def _candidates(scaled: Floats, sampling: Filters) -> Ints:
    """Tokens that may pass, sorted; no more than `top_k` where that is given."""
    largest = scaled.max()
    least = -np.inf
    if sampling.top_p < 1:  # tokens below this together weigh less than what top_p leaves out: the largest alone weighs 1
        least = float(largest) + np.log((1 - sampling.top_p) / len(scaled))
    if sampling.min_p:
        least = max(least, float(largest) + np.log(sampling.min_p) - 1e-4)
    if sampling.top_k and sampling.top_k < len(scaled):
        least = max(least, _at_least(scaled, sampling.top_k))
    found = np.flatnonzero(scaled >= np.float32(least)) if np.isfinite(least) else np.flatnonzero(np.isfinite(scaled))
    found = found[np.argsort(-scaled[found], kind="stable")]
    return found[: sampling.top_k] if sampling.top_k else found


def largest_tokens(values: Floats, count: int) -> Ints:
    """The `count` tokens of largest value, sorted; of equals the lower number first."""
    found = np.flatnonzero(values >= np.float32(_at_least(values, count)))
    return found[np.argsort(-values[found], kind="stable")][:count]


def _at_least(values: Floats, count: int) -> float:
    """A number that at least `count` of the values reach: that of the lanes' maxima."""
    columns = len(values) // _LANES
    if count > columns // 2:
        return float(np.partition(values, -count)[-count]) if count < len(values) else -np.inf
    maxima = values[: columns * _LANES].reshape(_LANES, columns).max(0)
    return float(np.partition(maxima, -count)[-count])


def _drawn_of_all(scaled: Floats, u: float) -> int:
    """By sums over columns of the folded vocabulary, then inside one column: two short searches instead of one sum of all."""
    size = len(scaled)
    columns = -(-size // _LANES)
    weights = np.zeros(columns * _LANES, np.float32)
    np.subtract(scaled, scaled.max(), out=weights[:size])
    np.exp(weights[:size], out=weights[:size])
    table = weights.reshape(_LANES, columns)
    sums = np.cumsum(table.sum(0), dtype=np.float64)
    column = _place(sums, u)
    before = float(sums[column - 1]) if column else 0.0
    inside = np.cumsum(table[:, column], dtype=np.float64)
    width = float(sums[column]) - before
    lane = _place(inside, (u * float(sums[-1]) - before) / width if width else 0.0)
    return lane * columns + column


def _place(sums: npt.NDArray[np.float64], u: float) -> int:
    """The first place whose running sum is above u of the last: one of weight above zero."""
    place = int(np.searchsorted(sums, min(max(u, 0.0), 1.0) * sums[-1], side="right"))
    return place if place < len(sums) else int(np.searchsorted(sums, sums[-1]))


def log_probability(logits: Floats, tokens: Ints) -> npt.NDArray[np.float64]:
    """Log probabilities of some tokens in the softmax of logits [V]."""
    largest = float(logits.max())
    total = np.exp(logits - np.float32(largest)).sum(dtype=np.float64)
    found: npt.NDArray[np.float64] = logits[tokens].astype(np.float64) - largest - np.log(total)
    return found
