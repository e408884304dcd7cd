"""Tokens chosen natively: those of numpy's and of Transformers' definitions, wherever the library decides."""

from __future__ import annotations

import ctypes as C
import random

import numpy as np
import pytest
import torch
from transformers.generation import logits_process as hf

from deepseek_optimizer.backends.cpu.buffers import address, optional
from deepseek_optimizer.backends.cpu.decode import GENERATOR_WORDS, native_choice
from deepseek_optimizer.backends.cpu.native import UNDECIDED, Context
from deepseek_optimizer.backends.decoding import RowChoice, TokenPenalties
from deepseek_optimizer.backends.sampling import GREEDY, NOT_FINITE, TokenChoice, apply_changes, choose_token
from deepseek_optimizer.engine.request import SamplingParams
from deepseek_optimizer.engine.sampling.token_rules import rules_of
from deepseek_optimizer.integration.generation.torch_generator import draws_as_expected, read_state

SIZES = (1, 3, 17, 64, 129, 1000, 20_000)


@pytest.fixture
def context(isa):
    return Context(isa, 1)


def choose(context, logits, row, steps=1, step=0, generator=None):
    before = logits.copy()
    choice, token = native_choice(row, steps, len(logits)), C.c_int32()
    place = address(logits, "logits", np.dtype(np.float32), logits.shape)
    words = optional(generator, "generator", np.dtype(np.uint32), (GENERATOR_WORDS,))
    context.call("dso_choose", context.handle, place, len(logits), C.byref(choice), step, words, C.byref(token))
    assert np.array_equal(logits, before, equal_nan=True)
    return token.value


def random_logits(rng, size):
    """Normal, with ties, with one large, or partly forbidden."""
    logits = rng.standard_normal(size) * rng.choice([0.1, 1, 3, 8])
    kind = rng.integers(4)
    if kind == 1:
        logits = np.round(logits)
    if kind == 2:
        logits[rng.integers(size)] += 12
    logits = logits.astype(np.float32)
    if kind == 3:
        logits[rng.random(size) < 0.5] = -np.inf
        logits[rng.integers(size)] = 1.0
    return logits


def random_filters(rng):
    return TokenChoice(
        temperature=float(rng.choice([1.0, 0.7, 0.2, 1.6, 1e-5])),
        top_k=int(rng.choice([0, 0, 1, 2, 40, 700, 10**6])),
        top_p=float(rng.choice([1.0, 1.0, 0.9, 0.5, 0.05, 0.999])),
        min_p=float(rng.choice([0.0, 0.0, 0.02, 0.3, 1.0])),
    )


def of_transformers(logits, filters, penalty, tokens, seed):
    scores, ids = torch.from_numpy(logits.copy())[None], torch.tensor([tokens], dtype=torch.long)
    if penalty != 1:
        scores = hf.RepetitionPenaltyLogitsProcessor(penalty)(ids, scores)
    if filters is None:
        return int(scores[0].numpy().argmax())
    scores = warped(scores[0].numpy(), filters)
    torch.manual_seed(seed)
    return int(torch.multinomial(scores.softmax(-1), 1))


def warped(logits, filters):
    """Logits after Transformers' warpers, float32 [1, V]."""
    scores, ids = torch.from_numpy(logits.copy())[None], None
    if filters.temperature != 1:
        scores = hf.TemperatureLogitsWarper(filters.temperature)(ids, scores)
    if filters.top_k:
        scores = hf.TopKLogitsWarper(filters.top_k)(ids, scores)
    if filters.top_p < 1:
        scores = hf.TopPLogitsWarper(filters.top_p)(ids, scores)
    if filters.min_p:
        scores = hf.MinPLogitsWarper(filters.min_p)(ids, scores)
    return scores


def test_the_largest_logit(context):
    for n in range(300):
        rng = np.random.default_rng(n)
        logits = random_logits(rng, int(rng.choice(SIZES)))
        assert choose(context, logits, RowChoice()) == choose_token(logits, GREEDY)
        place, bad = rng.integers(len(logits)), rng.choice([np.nan, np.inf])
        logits[place] = bad
        assert choose(context, logits, RowChoice()) == UNDECIDED and choose_token(logits, GREEDY) == NOT_FINITE
    assert choose(context, np.full(70, -np.inf, np.float32), RowChoice()) == UNDECIDED


def test_draws_by_a_number(context):
    """As `backends.sampling` chooses."""
    decided = 0
    for n in range(1500):
        rng = np.random.default_rng(n)
        logits, filters = random_logits(rng, int(rng.choice(SIZES))), random_filters(rng)
        numbers = np.append(rng.random(2), rng.choice([0.0, 1 - 2**-53, 0.5]))
        for step, u in enumerate(numbers):
            token = choose(context, logits, RowChoice(filters, numbers), 3, step)
            assert token in (UNDECIDED, choose_token(logits, filters._replace(u=float(u)))), (n, filters, u)
            decided += token != UNDECIDED
    assert decided > 3 * 1500 * 0.75


def test_draws_by_noise(context):
    """As Transformers' warpers and `torch.multinomial` choose, with the numbers that torch would draw."""
    decided = 0
    for n in range(1500):
        rng = np.random.default_rng(n)
        logits, filters = random_logits(rng, int(rng.choice(SIZES))), random_filters(rng)
        torch.manual_seed(n)
        noise = torch.empty(1, len(logits)).exponential_()
        token = choose(context, logits, RowChoice(filters, noise=noise))
        assert token in (UNDECIDED, of_transformers(logits, filters, 1.0, [], n)), (n, filters)
        decided += token != UNDECIDED
    assert decided > 1500 * 0.8


def test_draws_by_torchs_generator(context):
    """The numbers are those of torch, after any number of draws before."""
    assert draws_as_expected()
    decided = 0
    for n in range(1500):
        rng = np.random.default_rng(n)
        logits, filters = random_logits(rng, int(rng.choice(SIZES))), random_filters(rng)
        before, skipped = rng.integers(0, 700, 2)
        torch.manual_seed(n)
        torch.empty(int(before)).exponential_()
        state, words = torch.get_rng_state(), read_state(torch.get_rng_state())
        token = choose(context, logits, RowChoice(filters, variate=int(skipped)), generator=words)
        scores = warped(logits, filters)
        torch.set_rng_state(state)
        torch.empty(int(skipped)).exponential_()
        assert token in (UNDECIDED, int(torch.multinomial(scores.softmax(-1), 1))), (n, filters)
        decided += token != UNDECIDED
    assert decided > 1500 * 0.8


@pytest.mark.parametrize("sampled", [False, True])
def test_penalties(context, sampled):
    for n in range(300):
        rng = np.random.default_rng(n)
        size = int(rng.choice(SIZES))
        logits, filters = random_logits(rng, size), random_filters(rng)
        text = rng.integers(size, size=rng.integers(0, 30)).tolist()
        prompt = int(rng.integers(0, len(text) + 1))
        repetition = float(rng.choice([1.0, 1.3, 0.7]))
        window, frequency, presence = int(rng.choice([0, 0, 5])), float(rng.choice([0.0, 0.4])), float(rng.choice([0.0, -0.3]))
        sampling = SamplingParams(
            repetition_penalty=repetition, repetition_window=window or None, frequency_penalty=frequency,
            presence_penalty=presence,
        )  # fmt: skip
        penalized = logits.copy()
        for rule in rules_of(sampling, text[:prompt], size):
            for token in text[prompt:]:
                rule.add(token)
            apply_changes(penalized, rule.changes())
        penalties = TokenPenalties(np.array(text, np.int32), prompt, repetition, window, frequency, presence)
        numbers = rng.random(1) if sampled else None
        choice = filters._replace(u=float(numbers[0])) if sampled else GREEDY
        token = choose(context, logits, RowChoice(filters, numbers, penalties=penalties))
        assert token in (UNDECIDED, choose_token(penalized, choice)) and (sampled or token != UNDECIDED)
        torch.manual_seed(n)
        noise = torch.empty(1, size).exponential_() if sampled else None
        ours = choose(
            context, logits, RowChoice(filters, noise=noise, penalties=TokenPenalties(penalties.tokens, 0, repetition))
        )
        assert ours in (UNDECIDED, of_transformers(logits, filters if sampled else None, repetition, text, n))


@pytest.mark.parametrize("sampled", [False, True])
def test_barred_tokens(context, sampled):
    """Their logits are -inf in the first steps only, after penalties on the same tokens."""
    for n in range(300):
        rng = np.random.default_rng(n)
        size = int(rng.choice(SIZES))
        logits, filters = random_logits(rng, size), random_filters(rng)
        barred = np.append(logits.argmax(), rng.integers(size, size=rng.integers(0, 4))).astype(np.int32)
        penalties = TokenPenalties(barred[:1], 0, 1.3)
        numbers = rng.random(3) if sampled else None
        expected = logits.copy()
        expected[barred[0]] *= 1.3 if expected[barred[0]] < 0 else 1 / 1.3
        row = RowChoice(filters, numbers, penalties=penalties, barred=barred, barred_steps=2)
        for step in range(3):
            allowed = expected.copy()
            if step < 2:
                allowed[barred] = -np.inf
            choice = filters._replace(u=float(numbers[step])) if sampled else GREEDY
            token = choose(context, logits, row, 3, step)
            right = choose_token(allowed, choice)
            assert token == right or token == UNDECIDED and (sampled or right == NOT_FINITE), (n, step)


def test_rows_of_noise_that_are_not_dense(context):
    torch.manual_seed(0)
    noise = torch.empty(3, 2, 500).exponential_()
    logits = np.random.default_rng(0).standard_normal(500).astype(np.float32)
    row = RowChoice(TokenChoice(1.0, top_k=20), noise=noise[:, 1])
    dense = [choose(context, logits, row._replace(noise=noise[step, 1][None])) for step in range(3)]
    assert [choose(context, logits, row, 3, step) for step in range(3)] == dense and len(set(dense)) > 1


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (RowChoice(TokenChoice(float("nan")), np.zeros(1)), "temperature"),
        (RowChoice(TokenChoice(1.0, top_k=-1), np.zeros(1)), "top_k"),
        (RowChoice(TokenChoice(1.0, top_p=1.5), np.zeros(1)), "top_p"),
        (RowChoice(TokenChoice(1.0, min_p=float("nan")), np.zeros(1)), "min_p"),
        (RowChoice(TokenChoice(1.0), np.zeros(1), torch.ones(1, 9)), "numbers, noise"),
        (RowChoice(penalties=TokenPenalties(np.array([9], np.int32), 0, 1.1)), "outside the vocabulary"),
        (RowChoice(penalties=TokenPenalties(np.array([1], np.int32), 2, 1.1)), "n_prompt"),
        (RowChoice(penalties=TokenPenalties(np.array([1], np.int32), 0, 0.0)), "repetition"),
        (RowChoice(penalties=TokenPenalties(np.array([1], np.int32), 0, window=-1)), "window"),
        (RowChoice(barred=np.array([9], np.int32), barred_steps=1), "barred has a token outside"),
        (RowChoice(barred=np.array([-1], np.int32), barred_steps=1), "barred has a token outside"),
        (RowChoice(TokenChoice(1.0), np.zeros(0)), "numbers must be"),
        (RowChoice(TokenChoice(1.0), noise=torch.ones(1, 8)), "noise must be"),
    ],
)
def test_invalid_choices(context, row, message):
    with pytest.raises(ValueError, match=message):
        choose(context, np.zeros(9, np.float32), row)


def test_noise_that_is_not_positive_is_left_to_the_caller(context):
    logits = np.zeros(40, np.float32)
    for bad in (0.0, -1.0, float("nan")):
        noise = torch.ones(1, 40)
        noise[0, random.Random(str(bad)).randrange(40)] = bad
        assert choose(context, logits, RowChoice(TokenChoice(1.0, top_k=3), noise=noise)) == UNDECIDED
