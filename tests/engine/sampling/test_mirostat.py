"""Mirostat against a transcription of llama.cpp's functions in float64."""

import math

import numpy as np
import pytest

from deepseek_optimizer.backends.sampling import uniform
from deepseek_optimizer.engine.request import Request, SamplingParams
from deepseek_optimizer.engine.sampling.mirostat import Mirostat
from deepseek_optimizer.engine.sampling.request_sampler import RequestSampler

VOCAB = 300


def softmax(values):
    e = [math.exp(v - values[0]) for v in values]
    return [v / sum(e) for v in e]


def draw(p, u):
    total = 0.0
    for n, value in enumerate(p):
        total += value
        if total > u * sum(p):
            return n
    return len(p) - 1


def llama_cpp(version, row, mu, tau, eta, u, m=100):
    """`llama_sampler_mirostat_apply` and `llama_sampler_mirostat_v2_apply`: the token and the new mu."""
    order = np.argsort(-row, kind="stable")
    values = [float(row[t]) for t in order]
    p = softmax(values)
    if version == 1:
        sum_ti_bi = sum_ti_sq = 0.0
        for i in range(min(m, len(p)) - 1):
            t_i, b_i = math.log((i + 2) / (i + 1)), math.log(p[i] / p[i + 1])
            sum_ti_bi += t_i * b_i
            sum_ti_sq += t_i * t_i
        s_hat = sum_ti_bi / sum_ti_sq
        epsilon = s_hat - 1
        k = ((epsilon * 2**mu) / (1 - len(row) ** -epsilon)) ** (1 / s_hat)
        size = min(len(p), max(int(k), 1))
    else:
        size = next((n for n, value in enumerate(p) if -math.log2(value) > mu), len(p)) or 1
    p = softmax(values[:size])
    n = draw(p, u)
    return int(order[n]), mu - eta * (-math.log2(p[n]) - tau)


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("tau,eta", [(5.0, 0.1), (1.0, 0.5), (8.0, 0.9)])
def test_tokens_and_mu_equal_llama_cpp(version, tau, eta):
    rng = np.random.default_rng(version)
    mirostat, mu = Mirostat(version, tau, eta, VOCAB), 2 * tau
    for place in range(60):
        row = (rng.standard_normal(VOCAB) * (1 + place % 4)).astype(np.float32)
        u = uniform(1, place)
        token, mu = llama_cpp(version, row, mu, tau, eta, u)
        assert mirostat.draw(row, u) == token
        assert mirostat.mu == pytest.approx(mu, abs=1e-4)


@pytest.mark.parametrize("version", [1, 2])
def test_unusual_logits(version):
    """All equal, one token allowed, and nearly all of the probability in one token."""
    only = np.full(VOCAB, -np.inf, np.float32)
    only[7] = 1.0
    peak = np.full(VOCAB, -1e4, np.float32)
    peak[9] = 1e4
    mirostat = Mirostat(version, 3.0, 0.2, VOCAB)
    for place in range(20):
        assert 0 <= mirostat.draw(np.zeros(VOCAB, np.float32), uniform(2, place)) < VOCAB
        assert mirostat.draw(only, uniform(3, place)) == 7 and mirostat.draw(peak, uniform(4, place)) == 9
        assert math.isfinite(mirostat.mu)


@pytest.mark.parametrize("version", [1, 2])
def test_the_text_has_the_target_information(version):
    """On a distribution that allows it, the mean surprise of the tokens approaches tau, from above and below."""
    row = (-1.1 * np.log(np.arange(1, 2001))).astype(np.float32)
    p = np.exp(row) / np.exp(row).sum()
    for tau in (2.0, 4.0):
        sampling = SamplingParams(seed=5, mirostat=version, mirostat_tau=tau, mirostat_eta=0.1)
        sampler = RequestSampler(Request([1], sampling), len(row), frozenset())
        tokens = [sampler.choose(row, place) for place in range(600)]
        surprise = np.mean([-math.log2(p[t]) for t in tokens[100:]])
        assert surprise < 2.2 * tau
        again = RequestSampler(Request([1], sampling), len(row), frozenset())
        assert [again.choose(row, place) for place in range(600)] == tokens
