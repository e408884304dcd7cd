"""Filters that only the engine has, besides those of `backends.sampling`: top_n_sigma, typical_p and XTC. No torch.

Sources: llama.cpp, `llama_sampler_top_n_sigma_apply`, `llama_sampler_typical_apply` and `llama_sampler_xtc_apply` in
src/llama-sampler.cpp; for typical_p also Transformers' `TypicalLogitsWarper`, which gives the same set of tokens.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from ...backends.sampling import Floats, Ints, draw_from, filtered, uniform
from ..request import SamplingParams

Weights = npt.NDArray[Any]


def has_filters(sampling: SamplingParams) -> bool:
    """Whether `draw_filtered` is needed instead of `backends.sampling.draw`."""
    xtc = sampling.xtc_probability > 0 and sampling.xtc_threshold <= 0.5
    return xtc or sampling.typical_p < 1 or sampling.top_n_sigma > 0


def draw_filtered(logits: Floats, sampling: SamplingParams, seed: int, place: int) -> int:
    """Samples a token after all filters.

    Args:
        logits: float32 [V], with penalties and masks applied; at least one is finite. Not modified.
        sampling: temperature, above 0, and filters.
        seed: of the random numbers; XTC's is independent of the one that selects the token.
        place: position in the generated text, from 0.
    """
    return draw_from(*remaining(logits, sampling, seed, place), uniform(seed, place))


def remaining(logits: Floats, sampling: SamplingParams, seed: int, place: int) -> tuple[Ints, Weights]:
    """The tokens that pass all filters, likeliest first, and their unnormalized weights; arguments as for `draw_filtered`."""
    tokens: Ints
    weights: Weights
    if sampling.top_n_sigma:
        logits = top_n_sigma(logits, sampling.top_n_sigma)
    tokens, weights = filtered(logits / np.float32(sampling.temperature), sampling)
    if sampling.typical_p < 1:
        tokens, weights = typical(tokens, weights, sampling.typical_p)
    if sampling.xtc_threshold <= 0.5 and uniform(seed, place, b"xtc") < sampling.xtc_probability:
        tokens, weights = exclude_top_choices(tokens, weights, sampling.xtc_threshold)
    return tokens, weights


def typical(tokens: Ints, weights: Weights, mass: float) -> tuple[Ints, Weights]:
    """The tokens whose information content is nearest to the entropy, until their probabilities sum to `mass`.

    Args:
        tokens: [n], likeliest first.
        weights: unnormalized, [n].
        mass: in (0, 1).

    Returns: the tokens that remain, likeliest first, and their weights.
    """
    p = weights[: np.count_nonzero(weights)].astype(np.float64)  # the least likely ones may underflow
    p /= p.sum()
    information = -np.log(p)
    distance = np.abs(information - (p * information).sum())
    order = np.argsort(distance, kind="stable")
    keep = 1 + int(np.searchsorted(np.cumsum(p[order])[:-1], mass))
    kept = np.sort(order[:keep])
    return tokens[kept], weights[kept]


def exclude_top_choices(tokens: Ints, weights: Weights, threshold: float) -> tuple[Ints, Weights]:
    """Removes the tokens with at least the probability `threshold`, except the least likely one of them.

    Args:
        tokens: [n], likeliest first.
        weights: unnormalized, [n].
        threshold: in [0, 0.5].
    """
    p = weights.astype(np.float64) / weights.sum(dtype=np.float64)
    first = max(0, int(np.count_nonzero(p >= threshold)) - 1)
    return tokens[first:], weights[first:]


def top_n_sigma(logits: Floats, sigmas: float) -> Floats:
    """A copy of logits [V] in which those that are more than `sigmas` standard deviations below the largest are minus infinity.
    Logits that are minus infinity already do not count for the deviation."""
    finite = logits[np.isfinite(logits)].astype(np.float64)
    kept: Floats = np.where(logits >= finite.max() - sigmas * finite.std(), logits, np.float32(-np.inf))
    return kept
