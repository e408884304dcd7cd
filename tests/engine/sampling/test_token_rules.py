"""Repetition within a window, forbidden words and allowed tokens."""

import random

import numpy as np
import pytest

from deepseek_optimizer import RequestError
from deepseek_optimizer.engine.request import Request, SamplingParams
from deepseek_optimizer.engine.sampling.request_sampler import NoTokenError, RequestSampler
from deepseek_optimizer.engine.sampling.words import bad_words

VOCAB = 100


def sampler(prompt=(1, 2), **fields):
    return RequestSampler(Request(list(prompt), SamplingParams(**{"temperature": 0, **fields})), VOCAB, frozenset([7]))


def logits(seed=0):
    return np.random.default_rng(seed).standard_normal(VOCAB).astype(np.float32) * 3


@pytest.mark.parametrize("window", [None, 0, 1, 5, 64])
def test_repetition_penalty_in_a_window(window):
    context = [3, 50, 50, 3, 8]
    c = sampler(context, repetition_penalty=2.0, repetition_window=window)
    for place in range(60):
        row = logits(place % 4)
        right = row.copy()
        for token in set(context if window is None else context[len(context) - min(window, len(context)) :]):
            right[token] *= 2.0 if right[token] < 0 else 0.5
        context.append(c.choose(row, place))
        assert context[-1] == int(right.argmax())


def test_a_forbidden_word_is_never_completed():
    words = ((4,), (5, 6), (5, 6, 8), (9, 9))
    c, text = sampler(bad_words=words, temperature=1.0, seed=2), []
    row = np.full(VOCAB, -20, np.float32)
    row[[4, 5, 6, 8, 9]] = 1
    for place in range(500):
        text.append(c.choose(row, place))
    pairs = set(zip(text, text[1:], strict=False))
    assert 4 not in text and (5, 6) not in pairs and (9, 9) not in pairs
    assert {5, 6, 8, 9} <= set(text) and (6, 8) in pairs


def test_only_tokens_of_the_text_count_for_forbidden_words():
    row = np.zeros(VOCAB, np.float32)
    row[6] = 5
    assert sampler([5], bad_words=((5, 6),)).choose(row, 0) == 6


def test_only_allowed_tokens():
    c = sampler(allowed_token_ids=(9, 11), temperature=1.0, seed=1)
    assert {c.choose(logits(n), n) for n in range(200)} == {9, 11}
    with pytest.raises(NoTokenError):
        sampler(allowed_token_ids=(9,), logit_bias={9: -100}).choose(logits(), 0)
    for fields in ({"allowed_token_ids": ()}, {"bad_words": ((),)}, {"bad_words": ((1,),) * 1025}):
        with pytest.raises(RequestError):
            SamplingParams(**fields)


def test_words_at_the_beginning_and_after_a_space():
    ids = {"dog": [1], " dog": [2], "cat": [3, 4], " cat": [5, 4], "x": [6], " x": [7, 6]}
    assert bad_words(["dog", "cat", "x"], ids.__getitem__) == ((1,), (2,), (3, 4), (5, 4), (6,))
    assert bad_words([" dog", "dog"], ids.__getitem__) == ((1,), (2,))


@pytest.mark.parametrize("name,values", [
    ("typical_p", [0, 1.1]), ("top_n_sigma", [-1, 101]), ("xtc_probability", [-0.1, 1.1]), ("xtc_threshold", [-0.1, 2]),
    ("dry_multiplier", [-1, 101]), ("dry_base", [0.9, 101]), ("dry_allowed_length", [-1, 1.5]), ("dry_last_n", [-1]),
    ("mirostat", [3, -1]), ("mirostat_tau", [-1]), ("mirostat_eta", [-1, 2]), ("repetition_window", [-1]),
])  # fmt: skip
def test_values_out_of_range(name, values):
    for value in values:
        with pytest.raises(RequestError, match=name):
            SamplingParams(**{name: value})


@pytest.mark.parametrize("seed", range(4))
def test_drafts_do_not_change_texts(seed):
    """Every stateful sampler, with drafts that are right most of the time."""
    from deepseek_optimizer.engine.engine import Completion
    from support.mock_model import VOCAB as SIZE
    from support.mock_model import make_core
    from support.scripted_proposer import ScriptedProposer

    rng = random.Random(seed)
    fields = [{"mirostat": 2, "mirostat_tau": 2.0}, {"mirostat": 1}, {"xtc_probability": 0.5}, {"dry_multiplier": 1.0},
              {"bad_words": ((3,), (4, 5))}, {"typical_p": 0.6, "repetition_penalty": 1.3, "repetition_window": 9}]  # fmt: skip
    prompt = [rng.randrange(SIZE - 1) for _ in range(40)]

    def run(script, more):
        core = make_core(proposers=[(ScriptedProposer(script, 0.7, SIZE, seed), 3)] if script else None)
        core.add(Request(prompt, SamplingParams(max_tokens=60, seed=seed, ignore_eos=True, **more), id="a"))
        answer = Completion()
        while not core.idle:
            for output in core.step():
                answer.add(output)
        return answer, core

    for more in fields:
        plain, _ = run(None, more)
        drafted, core = run({1: prompt + plain.token_ids}, more)
        assert drafted.token_ids == plain.token_ids and core.drafting.accepted > 0
