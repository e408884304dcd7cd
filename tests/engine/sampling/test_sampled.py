"""Log probabilities of the distribution that tokens are drawn from."""

import numpy as np
import pytest

from deepseek_optimizer import RequestError
from deepseek_optimizer.engine.request import Request, SamplingParams
from deepseek_optimizer.engine.sampling.request_sampler import RequestSampler

VOCAB = 50


def reported(row, **fields):
    """The token that is chosen from logits, and what is reported of it."""
    sampling = SamplingParams(**{"logprobs": 20, "sampled_logprobs": True, "seed": 1, **fields})
    sampler = RequestSampler(Request([1, 2], sampling), VOCAB, frozenset())
    token = sampler.choose(row, 0)
    plain = RequestSampler(Request([1, 2], SamplingParams(**{**fields, "seed": 1})), VOCAB, frozenset())
    assert token == plain.choose(row, 0)  # reporting does not change the choice
    return token, sampler.logprob(row, token)


def logits():
    return np.random.default_rng(0).standard_normal(VOCAB).astype(np.float32) * 2


def test_temperature_and_filters_count():
    row = logits()
    order = np.argsort(-row, kind="stable")
    p = np.exp(row[order[:4]].astype(np.float64) / 0.7)
    token, one = reported(row, temperature=0.7, top_k=4)
    assert [other for other, _ in one.top] == order[:4].tolist()
    np.testing.assert_allclose(np.exp([value for _, value in one.top]), p / p.sum(), rtol=1e-5)
    assert one.token == token and dict(one.top)[token] == pytest.approx(one.logprob)


@pytest.mark.parametrize(
    "fields",
    [
        {"top_p": 0.5},
        {"min_p": 0.2},
        {"typical_p": 0.6},
        {"top_n_sigma": 1.0},
        {"xtc_probability": 1.0, "xtc_threshold": 0.05},
        {},
    ],
)
def test_only_tokens_that_may_be_drawn_are_reported(fields):
    row = logits()
    _, one = reported(row, **fields)
    p = np.exp([value for _, value in one.top])
    assert (p > 0).all() and (np.diff(p) <= 0).all()
    assert p.sum() == pytest.approx(1) or len(p) == 20
    assert len(p) < 20 or not fields or one.top[0][0] != row.argmax()  # XTC removes the likeliest


def test_penalties_and_biases_count():
    row = logits()
    best = int(row.argmax())
    _, one = reported(row, logit_bias={best: -100})
    assert best not in dict(one.top)


def test_greedy_choices_are_certain():
    token, one = reported(logits(), temperature=0)
    assert one.logprob == 0 and one.top == ((token, 0.0),)
    assert reported(logits(), temperature=0, logprobs=0)[1].top == ()


def test_mirostat_is_refused():
    with pytest.raises(RequestError, match="sampled_logprobs"):
        SamplingParams(sampled_logprobs=True, mirostat=2)
