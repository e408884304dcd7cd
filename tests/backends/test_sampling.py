"""The sampling distribution against Transformers' warpers, and drawn tokens against the distribution."""

import numpy as np
import pytest
import torch
from transformers.generation import logits_process as hf

from deepseek_optimizer.backends.sampling import draw, filtered, largest_tokens, log_probability, uniform
from deepseek_optimizer.engine.request import SamplingParams

SETTINGS = [
    {"top_k": 1}, {"top_k": 5}, {"top_k": 700}, {"top_k": 10**6}, {"top_p": 0.9}, {"top_p": 0.01}, {"top_p": 0.999},
    {"min_p": 0.05}, {"min_p": 1.0}, {"top_k": 40, "top_p": 0.8}, {"top_k": 3, "top_p": 0.99, "min_p": 0.2},
    {"top_p": 0.7, "min_p": 0.01}, {"top_p": 0.9, "temperature": 0.3}, {"top_k": 50, "temperature": 3.0},
]  # fmt: skip


def of_transformers(logits, s):
    scores = hf.TemperatureLogitsWarper(float(s.temperature))(None, torch.from_numpy(logits)[None].double())
    if s.top_k:
        scores = hf.TopKLogitsWarper(s.top_k)(None, scores)
    if s.top_p < 1:
        scores = hf.TopPLogitsWarper(s.top_p)(None, scores)
    if s.min_p:
        scores = hf.MinPLogitsWarper(s.min_p)(None, scores)
    return scores[0].softmax(-1).numpy()


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("size", [17, 64, 1000, 49_152])
def test_filters_equal_transformers(settings, size):
    sampling = SamplingParams(**{"temperature": 1.0, **settings})
    for seed in range(4):
        logits = (np.random.default_rng(seed).standard_normal(size) * (1 + 2 * seed)).astype(np.float32)
        tokens, weights = filtered(logits / np.float32(sampling.temperature), sampling)
        made = np.zeros(size)
        made[tokens] = weights / weights.sum(dtype=np.float64)
        assert np.abs(made - of_transformers(logits, sampling)).max() < 2e-6


@pytest.mark.parametrize("settings", [{}, {"top_k": 12}, {"top_p": 0.8}, {"temperature": 2.0, "min_p": 0.1}], ids=str)
@pytest.mark.parametrize("size", [5, 130])
def test_draws_follow_the_distribution(settings, size):
    """Chi-square at a level that fails once in a million, with evenly spaced and with hashed numbers."""
    sampling = SamplingParams(**{"temperature": 1.0, **settings})
    logits = np.random.default_rng(size).standard_normal(size).astype(np.float32)
    right, count = of_transformers(logits, sampling), 20_000
    for numbers in ((np.arange(count) + 0.5) / count, [uniform(1, n) for n in range(count)]):
        seen = np.bincount([draw(logits, sampling, u) for u in numbers], minlength=size)
        assert not seen[right == 0].any()
        big = right * count >= 5
        stat = ((seen - right * count)[big] ** 2 / (right * count)[big]).sum()
        k = max(1, big.sum() - 1)
        assert stat < k * (1 - 2 / (9 * k) + 4.75 * (2 / (9 * k)) ** 0.5) ** 3  # Wilson and Hilferty


def test_draws_over_the_whole_range_are_allowed_tokens():
    logits = np.full(1000, -np.inf, np.float32)
    logits[[3, 500, 999]] = 0
    for u in [0.0, 1 / 3, 0.5, 2 / 3, 1 - 2**-53]:
        for settings in ({}, {"top_p": 0.9}, {"top_k": 900}, {"min_p": 0.5}):
            assert draw(logits, SamplingParams(**settings), u) in (3, 500, 999)


@pytest.mark.parametrize("temperature", [5e-324, 1e-46, 1e-38, 1e-37, 1e-6])
def test_tiny_temperatures_are_greedy(temperature):
    assert SamplingParams(temperature=temperature, top_p=0.9).greedy and not SamplingParams(temperature=1e-4).greedy
    logits = np.random.default_rng(0).standard_normal(500).astype(np.float32) * 30
    assert draw(logits, SamplingParams(temperature=1e-5), 0.999) == int(logits.argmax())


def test_random_numbers_depend_on_seed_and_position():
    assert uniform(5, 7) == uniform(5, 7) != uniform(5, 8) != uniform(6, 7)
    numbers = np.array([uniform(0, n) for n in range(20_000)])
    assert 0 <= numbers.min() and numbers.max() < 1 and abs(numbers.mean() - 0.5) < 0.01


@pytest.mark.parametrize("size", [1, 20, 63, 64, 4_000])
def test_the_most_likely_tokens(size):
    for seed in range(5):
        values = np.random.default_rng(seed).integers(0, 50, size).astype(np.float32)
        order = sorted(range(size), key=lambda t: (-values[t], t))
        for count in {1, min(20, size), size}:
            assert largest_tokens(values, count).tolist() == order[:count]


def test_log_probabilities():
    logits = np.random.default_rng(0).standard_normal(5_000).astype(np.float32) * 5
    right = torch.from_numpy(logits).double().log_softmax(-1).numpy()
    assert np.abs(log_probability(logits, np.arange(5_000)) - right).max() < 1e-5
