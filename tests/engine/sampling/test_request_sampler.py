"""Processing of logits before a token is chosen, against Transformers' processors and OpenAI's formulas."""

import numpy as np
import pytest
import torch
from transformers.generation import logits_process as hf

from deepseek_optimizer.engine.request import Request, SamplingParams
from deepseek_optimizer.engine.sampling.request_sampler import NotANumberError, NoTokenError, RequestSampler

VOCAB, EOS = 100, frozenset([7])


def sampler(prompt=(1, 2), grammar=None, **fields):
    return RequestSampler(Request(list(prompt), SamplingParams(**{"temperature": 0, **fields}, grammar=grammar)), VOCAB, EOS)


def logits(seed=0):
    return np.random.default_rng(seed).standard_normal(VOCAB).astype(np.float32) * 3


def test_repetition_penalty_equals_transformers():
    c, context = sampler([3, 50, 50], repetition_penalty=1.7), [3, 50, 50]
    for place in range(40):
        row = logits(place)
        scores = hf.RepetitionPenaltyLogitsProcessor(1.7)(torch.tensor([context]), torch.from_numpy(row.copy())[None])
        token = c.choose(row, place)
        assert token == int(scores[0].argmax())
        context.append(token)
    assert (row == logits(39)).all()  # not changed


@pytest.mark.parametrize("penalty", [5e-324, 1e-300, 1e-45, 1e-26])
@pytest.mark.parametrize("more", [{}, {"temperature": 1e-5, "seed": 1}, {"temperature": 100.0, "seed": 1, "min_p": 1e-300}])
def test_the_smallest_repetition_penalties(penalty, more):
    """The most likely token that occurred before gets all the probability."""
    row = logits()
    row[[3, 50, 60]] = 1.0, 1.5, -2.0
    c = sampler([3, 50, 60], repetition_penalty=penalty, **more)
    assert [c.choose(row, place) for place in range(5)] == [50] * 5


def test_presence_and_frequency_penalties_follow_openai():
    c, text = sampler(presence_penalty=1.5, frequency_penalty=0.5), []
    for place in range(40):
        row = logits(place % 3)
        right = row.astype(np.float64)
        for token in set(text):
            right[token] -= 1.5 + 0.5 * text.count(token)
        text.append(c.choose(row, place))
        assert text[-1] == int(right.argmax())
    assert len(set(text)) > 10


def test_biases_can_forbid_and_force_tokens():
    row = logits()
    best = int(row.argmax())
    assert sampler(logit_bias={best: -100}).choose(row, 0) != best
    assert sampler(logit_bias={9: 100}).choose(row, 0) == 9
    assert sampler(logit_bias={9: 0.001}).choose(row, 0) == best


def test_no_end_before_min_tokens():
    row = logits()
    row[7], row[8] = 50, 40
    c = sampler(min_tokens=2, stop_token_ids=(8,))
    assert [c.choose(row, n) for n in range(3)][:2] == [c.choose(row, 0)] * 2 and c.choose(row, 2) == 7
    assert c.choose(row, 1) not in (7, 8)


class Even:
    """A grammar of three even tokens."""

    def __init__(self):
        self.taken = []

    def start(self):
        return Even()

    def mask(self, bits):
        bits[:] = 0x55555555
        return True

    def accept(self, token):
        self.taken.append(token)

    @property
    def finished(self):
        return len(self.taken) == 3


def test_a_grammar_masks_logits_and_advances():
    for fields in ({}, {"temperature": 1.0, "seed": 1}, {"temperature": 1.0, "top_p": 0.5, "seed": 2}):
        c = sampler(grammar=Even(), **fields)
        taken = [c.choose(logits(n), n) for n in range(20)]
        assert all(t % 2 == 0 for t in taken) and c.grammar.taken == taken
    first = sampler(grammar=Even()).choose(logits(5), 0)
    assert first == max(range(0, VOCAB, 2), key=lambda t: logits(5)[t])


@pytest.mark.parametrize("place", [0, 50, 99])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_non_finite_logits(place, value):
    for fields in ({}, {"temperature": 1.0}, {"repetition_penalty": 1.1}):
        row = logits()
        row[place] = value
        with pytest.raises(NotANumberError):
            sampler(**fields).choose(row, 0)
    with pytest.raises(NotANumberError):
        sampler().choose(np.full(VOCAB, -np.inf, np.float32), 0)


def test_no_token_left():
    for fields in ({"temperature": 0}, {"temperature": 1.0}):
        with pytest.raises(NoTokenError):
            sampler(**fields, logit_bias=dict.fromkeys(range(VOCAB), -100)).choose(logits(), 0)


def test_unseeded_texts_differ():
    row = np.zeros(VOCAB, np.float32)
    texts = {tuple(c.choose(row, n) for n in range(8)) for c in (sampler(temperature=1.0) for _ in range(10))}
    assert len(texts) == 10
