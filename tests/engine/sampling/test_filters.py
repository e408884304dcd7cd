"""typical_p, XTC and top_n_sigma against direct definitions in float64, and Transformers' processor for typical_p."""

import numpy as np
import pytest
import torch
from transformers.generation import logits_process as hf

from deepseek_optimizer.backends.sampling import uniform
from deepseek_optimizer.engine.request import Request, SamplingParams
from deepseek_optimizer.engine.sampling.filters import exclude_top_choices, top_n_sigma, typical
from deepseek_optimizer.engine.sampling.request_sampler import RequestSampler

VOCAB = 200


def logits(seed, scale=3.0):
    return (np.random.default_rng(seed).standard_normal(VOCAB) * scale).astype(np.float32)


def softmax(row):
    e = np.exp(row.astype(np.float64) - row.max())
    return e / e.sum()


def sorted_weights(row):
    tokens = np.argsort(-row, kind="stable")
    return tokens, np.exp(row[tokens] - row.max())


def possible(row, seed=0, **fields):
    """The tokens that a request can draw from a row, over many random numbers, and how often each is drawn."""
    drawn = np.zeros(len(row), int)
    sampler = RequestSampler(Request([1], SamplingParams(seed=seed, **fields)), len(row), frozenset())
    for place in range(4000):
        drawn[sampler.choose(row, place)] += 1
    return set(np.flatnonzero(drawn).tolist()), drawn / drawn.sum()


@pytest.mark.parametrize("mass", [0.05, 0.3, 0.7, 0.95, 0.999])
@pytest.mark.parametrize("seed", range(5))
def test_typical_equals_transformers_and_the_formula(mass, seed):
    row = logits(seed, scale=1 + seed)
    kept, _ = typical(*sorted_weights(row), mass)
    scores = hf.TypicalLogitsWarper(mass)(torch.zeros(1, 1, dtype=torch.long), torch.from_numpy(row.astype(np.float64))[None])
    assert set(kept.tolist()) == set(torch.isfinite(scores[0]).nonzero()[:, 0].tolist())
    p = softmax(row)
    distance = abs(-np.log(p) - (p * -np.log(p)).sum())
    right, total = set(), 0.0
    for token in np.argsort(distance, kind="stable"):
        right.add(int(token))
        total += p[token]
        if total > mass:
            break
    assert set(kept.tolist()) == right
    assert (np.diff(row[kept]) <= 0).all()  # likeliest first


def test_typical_with_weights_that_underflow():
    row = np.full(VOCAB, -200, np.float32)
    row[[3, 4]] = 0, -1
    assert set(typical(*sorted_weights(row), 0.999)[0].tolist()) == {3, 4}


@pytest.mark.parametrize("threshold", [0.0, 0.05, 0.1, 0.3, 0.5])
@pytest.mark.parametrize("seed", range(5))
def test_xtc_keeps_the_least_likely_of_the_top_choices(threshold, seed):
    row = logits(seed, 2.0)
    tokens, weights = sorted_weights(row)
    kept, _ = exclude_top_choices(tokens, weights, threshold)
    p = softmax(row)
    top = [token for token in tokens if p[token] >= threshold]
    assert kept.tolist() == [token for token in tokens if token not in top[:-1]]


def test_xtc_applies_with_its_probability():
    row = np.full(VOCAB, -30, np.float32)
    row[:3] = np.log([0.5, 0.3, 0.2])
    always, frequency = possible(row, temperature=1.0, xtc_probability=1.0, xtc_threshold=0.25)
    assert always == {1, 2} and frequency[1] == pytest.approx(0.6, abs=0.04)
    _, frequency = possible(row, temperature=1.0, xtc_probability=0.4, xtc_threshold=0.25)
    assert frequency[0] == pytest.approx(0.6 * 0.5, abs=0.04)  # independent of the number that selects the token
    assert possible(row, temperature=1.0, xtc_probability=1.0, xtc_threshold=0.51)[0] == {0, 1, 2}
    assert uniform(3, 4, b"xtc") != uniform(3, 4)


@pytest.mark.parametrize("sigmas", [0.5, 1.0, 2.5])
def test_top_n_sigma(sigmas):
    row = logits(3)
    row[[5, 6]] = -np.inf
    finite = [float(value) for value in row if np.isfinite(value)]
    mean = sum(finite) / len(finite)
    deviation = (sum((value - mean) ** 2 for value in finite) / len(finite)) ** 0.5
    kept = top_n_sigma(row, sigmas)
    assert set(np.flatnonzero(np.isfinite(kept))) == {t for t in range(VOCAB) if row[t] >= max(finite) - sigmas * deviation}
    assert possible(row, temperature=5.0, top_n_sigma=sigmas)[0] <= set(np.flatnonzero(np.isfinite(kept)).tolist())


def test_filters_follow_top_k_top_p_and_min_p():
    row = logits(1, 1.0)
    best = np.argsort(-row)[:10]
    allowed, _ = possible(row, temperature=1.0, top_k=10, typical_p=0.5)
    p = softmax(row[best])
    kept, _ = typical(best, p, 0.5)
    assert allowed == set(kept.tolist())


@pytest.mark.parametrize(
    "fields", [{"typical_p": 0.5}, {"xtc_probability": 1.0}, {"top_n_sigma": 1.0}, {"mirostat": 1}, {"mirostat": 2}]
)
def test_a_backend_does_not_choose_tokens_with_filters_that_it_lacks(fields):
    def sampler(**more):
        return RequestSampler(Request([1], SamplingParams(seed=1, **{**fields, **more})), VOCAB, frozenset())

    assert sampler().choice(0) is None
    greedy = sampler(temperature=0)
    assert greedy.choice(0) is not None and greedy.choose(logits(1), 0) == logits(1).argmax()
