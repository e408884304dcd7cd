"""DRY against a direct transcription of llama.cpp's definition, and the index of sequence breakers."""

import random

import numpy as np
import pytest

from deepseek_optimizer.backends.sampling import apply_changes
from deepseek_optimizer.engine.request import Request, SamplingParams
from deepseek_optimizer.engine.sampling.dry import Dry, common_suffixes
from deepseek_optimizer.engine.sampling.request_sampler import RequestSampler
from deepseek_optimizer.engine.sampling.words import BreakerIndex

VOCAB = 12


def penalties(text, sampling):
    """`llama_sampler_dry_apply` over a whole text: the penalty of each token."""
    result = np.zeros(VOCAB)
    n = len(text) if sampling.dry_last_n is None else min(len(text), sampling.dry_last_n)
    last = text[len(text) - n :]

    def from_end(i):
        return last[n - 1 - i]

    if n <= sampling.dry_allowed_length:
        return result
    limit = n
    for i in range(n):
        longest = -1
        for tail in sampling.dry_breakers.get(from_end(i), ()):
            if longest < len(tail) <= i and all(tail[k] == from_end(i - k - 1) for k in range(len(tail))):
                longest = len(tail)
        if longest >= 0:
            limit = i - longest
            break
    if limit < sampling.dry_allowed_length:
        return result
    best = {}
    for place in range(n - 1):
        length = 0
        while length <= place and last[place - length] == last[n - 1 - length]:
            length += 1
        length = min(length, limit)
        if length >= sampling.dry_allowed_length:
            best[last[place + 1]] = max(best.get(last[place + 1], 0), length)
    for token, length in best.items():
        if () not in sampling.dry_breakers.get(token, ()):
            result[token] = sampling.dry_multiplier * sampling.dry_base ** (length - sampling.dry_allowed_length)
    return result


@pytest.mark.parametrize("seed", range(40))
def test_penalties_equal_the_definition(seed):
    rng = random.Random(seed)
    alphabet = rng.choice([2, 3, VOCAB])
    breakers = {}
    for _ in range(rng.randrange(4)):
        tails = {tuple(rng.randrange(alphabet) for _ in range(rng.randrange(4))) for _ in range(2)}
        breakers[rng.randrange(alphabet)] = tuple(tails)
    sampling = SamplingParams(
        dry_multiplier=rng.choice([0.5, 1.0]), dry_base=rng.choice([1.0, 1.1, 1.75]), dry_allowed_length=rng.randrange(5),
        dry_last_n=rng.choice([None, 1, 7, 20]), dry_breakers=breakers,
    )  # fmt: skip
    text = [rng.randrange(alphabet) for _ in range(rng.randrange(1, 30))]
    dry = Dry(sampling, list(text))
    for _ in range(80):
        row = np.zeros(VOCAB, np.float32)
        apply_changes(row, dry.changes())
        np.testing.assert_allclose(-row, penalties(text, sampling), rtol=1e-5)
        token = rng.choice(text[-6:]) if rng.random() < 0.6 else rng.randrange(alphabet)
        text.append(token)
        dry.add(token)


def test_a_penalty_is_finite_however_long_the_repetition():
    sampling = SamplingParams(temperature=0, dry_multiplier=100.0, dry_base=100.0)
    sampler = RequestSampler(Request([3] * 5000, sampling), VOCAB, frozenset())
    row = np.zeros(VOCAB, np.float32)
    row[3], row[4] = 30, 1
    assert sampler.choose(row, 0) == 4


def test_suffixes_in_linear_time():
    assert common_suffixes([1, 2, 1, 2, 1]) == [1, 0, 3, 0, 0]
    assert common_suffixes([5]) == [0] and common_suffixes([]) == []
    assert common_suffixes([7] * 50_000)[:2] == [1, 2]  # quadratic, it would take minutes


def test_breakers_are_tokens_that_contain_or_begin_them():
    words = [b"a", b"\n", b" b\n", b"x", b"<", b"<|", b"|>", b"end", b" <|e", b"n", b"d", b">"]
    encoded = {"|end|>": [5, 7, 6], "end|>": [7, 6], "nd|>": [9, 10, 6]}
    index, encode = BreakerIndex(words), lambda text: encoded.get(text, [3])
    assert index.breakers(["\n"], encode) == {1: ((),), 2: ((),)}
    assert index.breakers(["<|end|>"], encode) == {4: ((5, 7, 6),), 5: ((7, 6),), 8: ((9, 10, 6),)}
    assert index.breakers([], encode) == {} and index.breakers([""], encode) == {}
