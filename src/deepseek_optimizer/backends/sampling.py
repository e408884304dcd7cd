"""Chooses a token from a row of logits, in numpy: the definition that every backend's `Plan.choose_tokens` follows.

The filters are those of Transformers (`TemperatureLogitsWarper`, `TopKLogitsWarper`, `TopPLogitsWarper`, `MinPLogitsWarper`),
in that order. Sorting a whole vocabulary takes longer than the rest of a small model's step, so only tokens that can pass the
filters are sorted. No torch.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]
NOT_FINITE = -1  # instead of a token: the row's largest logit is NaN or infinite
LANES = 64  # rows that a vocabulary is folded into, to search its columns' maxima and sums first


class Filters(Protocol):
    """Temperature (above 0) and the filters; with the defaults of `TokenChoice` nothing is filtered."""

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
        temperature: 0: the largest logit, the first if several are equal; the other fields are ignored then.
        top_k: number of likeliest tokens to sample from; 0: all.
        top_p: total probability of the likeliest tokens to sample from, in (0, 1].
        min_p: minimum probability relative to the likeliest token's, in [0, 1].
        u: a number in [0, 1) that selects a token of the filtered distribution, see `draw`.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    u: float = 0.0


GREEDY = TokenChoice()


class Change(NamedTuple):
    """Changes the logits of some tokens before a token is chosen, in fp32: first by the factor, then by addition.

    Attributes:
        tokens: [n], without repetition unless all have the same change.
        factor: logits above 0 are divided by it, and others multiplied.
        added: float32 [n], may be -inf, which bars a token; None: nothing is added.
    """

    tokens: Ints
    factor: float = 1.0
    added: Floats | None = None


class ChangedChoice(NamedTuple):
    """How one row's token is chosen and reported, for rows on a device.

    Attributes:
        choice: how it is chosen.
        changes: what is done to the logits first, in this order.
        logprobs: number of likeliest tokens to report beside the chosen one, by the logits without changes; None: nothing is
            reported.
    """

    choice: TokenChoice
    changes: tuple[Change, ...] = ()
    logprobs: int | None = None


def apply_changes(logits: Floats, changes: Sequence[Change]) -> None:
    """Changes float32 logits [V] in place; those that are finite stay so unless their token is barred."""
    for change in changes:
        own = logits[change.tokens]
        if change.factor != 1:
            factor = np.float32(change.factor)
            own = np.where(own < 0, own * factor, own / factor)
        logits[change.tokens] = own if change.added is None else own + change.added


def choose_token(logits: Floats, choice: TokenChoice) -> int:
    """The token that `choice` selects from float32 logits [V]; NOT_FINITE if the largest logit is NaN or infinite."""
    token = int(logits.argmax())
    if not np.isfinite(logits[token]):
        return NOT_FINITE
    return token if choice.temperature == 0 else draw(logits, choice, choice.u)


def choose_tokens(logits: Floats, choices: Sequence[TokenChoice | None]) -> list[int | None]:
    """`choose_token` for each row of float32 logits [R, V]; None if its choice is None."""
    return [None if choice is None else choose_token(row, choice) for row, choice in zip(logits, choices, strict=True)]


def uniform(seed: int, place: int, purpose: bytes = b"") -> float:
    """A pseudo-random number in [0, 1) determined by a seed and a position in the text, independent of earlier draws.

    Args:
        seed: 0 to 2^64 - 1.
        place: position in the text.
        purpose: at most 16 bytes; numbers for different purposes are independent. Tokens are drawn with the default.
    """
    digest = hashlib.blake2b(struct.pack("<QQ", seed, place), digest_size=8, person=purpose).digest()
    return float(int.from_bytes(digest, "little") >> 11) / (1 << 53)


def draw(logits: Floats, sampling: Filters, u: float) -> int:
    """Samples a token from the filtered distribution.

    Args:
        logits: [V], with penalties and masks applied; at least one is finite.
        sampling: temperature and filters.
        u: in [0, 1); selects the token.
    """
    scaled = logits / np.float32(sampling.temperature)
    if sampling.top_k or sampling.top_p < 1 or sampling.min_p:
        return draw_from(*filtered(scaled, sampling), u)
    return _draw_unfiltered(scaled, u)


def draw_from(tokens: Ints, weights: npt.NDArray[Any], u: float) -> int:
    """The token that u in [0, 1) selects from tokens [n] with unnormalized weights [n], of which at least one is above 0."""
    return int(tokens[_place(np.cumsum(weights, dtype=np.float64), u)])


def filtered(scaled: Floats, sampling: Filters) -> tuple[Ints, Floats]:
    """The tokens that pass the filters, likeliest first (ties: the lower id first), and their unnormalized weights [n].

    Args:
        scaled: logits divided by temperature, [V].
        sampling: the filters.
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
    """Tokens that may pass, sorted by descending logit; at most `top_k` if that is set."""
    largest = scaled.max()
    bound = -np.inf
    if sampling.top_p < 1:  # all tokens below it together weigh less than top_p may discard: the largest alone weighs 1
        bound = float(largest) + np.log((1 - sampling.top_p) / len(scaled))
    if sampling.min_p:
        bound = max(bound, float(largest) + np.log(sampling.min_p) - 1e-4)
    if sampling.top_k and sampling.top_k < len(scaled):
        bound = max(bound, _lower_bound(scaled, sampling.top_k))
    tokens = np.flatnonzero(scaled >= np.float32(bound)) if np.isfinite(bound) else np.flatnonzero(np.isfinite(scaled))
    tokens = tokens[np.argsort(-scaled[tokens], kind="stable")]
    return tokens[: sampling.top_k] if sampling.top_k else tokens


def largest_tokens(values: Floats, count: int) -> Ints:
    """The `count` tokens with the largest values, in descending order; ties: the lower id first."""
    tokens = np.flatnonzero(values >= np.float32(_lower_bound(values, count)))
    return tokens[np.argsort(-values[tokens], kind="stable")][:count]


def _lower_bound(values: Floats, count: int) -> float:
    """A lower bound of the `count` largest values, from the maxima of the folded columns."""
    columns = len(values) // LANES
    if count > columns // 2:
        return float(np.partition(values, -count)[-count]) if count < len(values) else -np.inf
    maxima = values[: columns * LANES].reshape(LANES, columns).max(0)
    return float(np.partition(maxima, -count)[-count])


def _draw_unfiltered(scaled: Floats, u: float) -> int:
    """Samples from all tokens: first a column of the folded vocabulary by its sum, then a token in it. Two short searches
    replace a cumulative sum over the whole vocabulary."""
    size = len(scaled)
    columns = -(-size // LANES)
    weights = np.zeros(columns * LANES, np.float32)
    np.subtract(scaled, scaled.max(), out=weights[:size])
    np.exp(weights[:size], out=weights[:size])
    table = weights.reshape(LANES, columns)
    sums = np.cumsum(table.sum(0), dtype=np.float64)
    column = _place(sums, u)
    before = float(sums[column - 1]) if column else 0.0
    inside = np.cumsum(table[:, column], dtype=np.float64)
    width = float(sums[column]) - before
    lane = _place(inside, (u * float(sums[-1]) - before) / width if width else 0.0)
    return lane * columns + column


def _place(sums: npt.NDArray[np.float64], u: float) -> int:
    """The first index whose cumulative sum exceeds u times the total; its weight is above zero."""
    place = int(np.searchsorted(sums, min(max(u, 0.0), 1.0) * sums[-1], side="right"))
    return place if place < len(sums) else int(np.searchsorted(sums, sums[-1]))


def log_probability(logits: Floats, tokens: Ints) -> npt.NDArray[np.float64]:
    """Log probabilities of the given tokens in the softmax of logits [V]."""
    largest = float(logits.max())
    total = np.exp(logits - np.float32(largest)).sum(dtype=np.float64)
    result: npt.NDArray[np.float64] = logits[tokens].astype(np.float64) - largest - np.log(total)
    return result
