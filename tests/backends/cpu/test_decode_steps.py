"""`decode_steps` chooses the tokens that the native loop chooses in one call."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from deepseek_optimizer.backends.base import DECODE, StepBatch
from deepseek_optimizer.backends.decode_steps import decode_steps
from deepseek_optimizer.backends.decoding import DecodeCall, Decoded, RowChoice, TokenPenalties
from deepseek_optimizer.backends.sampling import TokenChoice
from deepseek_optimizer.graph import rules
from deepseek_optimizer.models import build_graph
from support.models import CASES, random_ids, random_model, weights_of
from support.steps import Part, make_batch, runner

from .packing import packed_weights

STEPS, VOCAB = 9, 211
WARM = TokenChoice(temperature=1.4, top_k=20, top_p=0.9, min_p=0.0, u=0.0)


def choices(kind):
    """Of two sequences."""
    generator, barred = np.random.default_rng(2), np.arange(0, VOCAB, 2, dtype=np.int32)
    noise = torch.empty(2, STEPS, VOCAB).exponential_(generator=torch.Generator().manual_seed(3))
    return {
        "largest": [RowChoice()] * 2,
        "numbers": [RowChoice(WARM, numbers=generator.random(STEPS)) for _ in range(2)],
        "noise": [RowChoice(WARM, noise=row) for row in noise],
        "variates": [RowChoice(WARM, variate=VOCAB * n) for n in range(2)],
        "barred": [RowChoice(barred=barred, barred_steps=4), RowChoice(WARM, numbers=generator.random(STEPS))],
    }[kind]


def generator_state():
    """A state of `DecodeCall.generator`."""
    state = torch.Generator().manual_seed(11).get_state().numpy()
    words = state[24 : 24 + 4 * 2 * 624].view(np.uint32)[::2]
    return np.concatenate([np.array([1, 0], np.uint32), words]).astype(np.uint32)


@pytest.fixture
def decode(backend):
    """Runs a call after two prompts, natively or step by step; returns the result and the state of the generator."""
    model = random_model(CASES["llama-gqa"]())
    graph, _ = rules.apply(build_graph(model.config), None)
    weights = packed_weights(weights_of(model), "fp32")

    def run(singly, rows, steps=STEPS, stops=(), seconds=math.inf, **more):
        r = runner(backend, graph, weights)
        blocks = [r.sequence(), r.sequence()]
        for n, sequence in enumerate(blocks):
            r.plan.run(make_batch([Part(sequence, random_ids(model.config, 5 + n, seed=n))], r.store), r.store)
        batch = make_batch([Part(sequence, [7], DECODE) for sequence in blocks], r.store)
        batch.draft_states = more.pop("draft_states", False)
        generator = generator_state() if rows[0].variate is not None else None
        call = DecodeCall(steps, rows, np.array(stops, np.int32), seconds, generator, 2 * VOCAB, **more)
        if singly:
            return decode_steps(lambda b, c: r.plan.decode(b, r.store, c), batch, call), generator
        return r.plan.decode(batch, r.store, call), generator

    return run


@pytest.mark.parametrize("kind", ["largest", "numbers", "noise", "variates", "barred"])
@pytest.mark.parametrize("mapped", [False, True])
def test_equals_one_call(decode, kind, mapped):
    token_of = np.random.default_rng(5).permutation(VOCAB).astype(np.int32) if mapped else None
    (expected, after), (actual, state) = (decode(singly, choices(kind), token_of=token_of) for singly in (False, True))
    assert len(expected.tokens) == STEPS and expected.logits is None
    assert actual.tokens.tolist() == expected.tokens.tolist()
    assert actual.logits is None
    assert (state is None) == (kind != "variates") and (state is None or (state == after).all())


@pytest.mark.parametrize("place", range(4))
def test_a_stop_ends_it(decode, place):
    chosen = decode(False, choices("numbers"))[0].tokens
    stop = chosen[place, 1]
    expected, actual = (decode(singly, choices("numbers"), stops=[stop])[0].tokens.tolist() for singly in (False, True))
    assert actual == expected
    assert len(actual) == 1 + next(n for n, row in enumerate(chosen.tolist()) if stop in row)


def test_no_further_step_begins_after_the_time(decode):
    assert len(decode(True, choices("largest"), seconds=0.0)[0].tokens) == 1


@pytest.mark.parametrize("more", [{"keep_logits": True}, {"draft_states": True}], ids=["logits", "draft states"])
def test_one_step_where_each_has_a_result_to_keep(decode, more):
    (expected, _), (actual, _) = decode(False, choices("largest"), 1, **more), decode(True, choices("largest"), **more)
    assert actual.tokens.tolist() == expected.tokens.tolist()
    for name in ("kept_logits", "draft_states"):
        one, other = getattr(expected, name), getattr(actual, name)
        assert (one is None) == (other is None) and (one is None or torch.equal(one, other))


def test_one_step_with_penalties(decode):
    penalties = TokenPenalties(np.array([3, 4], np.int32), 2, repetition=1.3)
    rows = [RowChoice(penalties=penalties), RowChoice()]
    assert decode(True, rows)[0].tokens.tolist() == decode(False, rows, 1)[0].tokens.tolist()


def test_an_undecided_step_is_returned_after_the_tokens_before_it():
    """A step whose tokens the caller must choose ends the call."""
    logits, begun = torch.zeros(1, VOCAB), []

    def one_step(batch, call):
        begun.append((int(batch.token_ids[0]), int(batch.positions[0]), int(batch.context_len[0])))
        nothing = len(begun) == 3
        return Decoded(np.full((0 if nothing else 1, 1), 40 + len(begun), np.int32), logits if nothing else None)

    one = np.array([6], np.int32)
    batch = StepBatch(one, one + 1, one * 0 + 1, one, one * 0 + DECODE, one[None] * 0, one * 0)
    done = decode_steps(one_step, batch, DecodeCall(STEPS, [RowChoice()], np.zeros(0, np.int32), math.inf))
    assert begun == [(6, 7, 6), (41, 8, 7), (42, 9, 8)]
    assert done.tokens.tolist() == [[41], [42]] and done.logits is logits and done.steps == 3
