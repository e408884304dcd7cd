"""Several decode steps in one call: the same texts as in single steps, whatever ends a call."""

from __future__ import annotations

import random

import pytest

from deepseek_optimizer.engine.engine import Completion
from deepseek_optimizer.engine.request import Request, SamplingParams
from deepseek_optimizer.engine.speculative.prompt_lookup import PromptLookupProposer
from support.mock_model import EOS, VOCAB, blocks_in_use, expected, make_core, run_with_arrivals


def run(core, requests):
    """All answers by id, and the number of engine steps."""
    answers = {r.id: Completion() for r in requests}
    for request in requests:
        core.add(request)
    steps = 0
    while not core.idle:
        steps += 1
        for output in core.step():
            answers[output.request_id].add(output)
    assert blocks_in_use(core) == 0
    return answers, steps


def requests_of(rng, count, **fields):
    texts = [[rng.randrange(VOCAB - 1) for _ in range(rng.randrange(1, 90))] for _ in range(count)]
    return [Request(p, SamplingParams(max_tokens=rng.randrange(1, 90), **fields), id=str(n)) for n, p in enumerate(texts)]


@pytest.mark.parametrize("undecided", [0.0, 0.3, 1.0])
def test_greedy_texts(undecided):
    core = make_core(batch_size_range=(1, 3))
    core.unwatched = core.runner.decodes = True
    core.runner.undecided = undecided
    requests = requests_of(random.Random(3), 12, temperature=0)
    answers, steps = run(core, requests)
    for request in requests:
        text = expected(request.prompt, request.sampling.max_tokens)
        assert answers[request.id].token_ids == text
        assert answers[request.id].finish == ("stop" if text[-1] == EOS else "length")
    assert steps < len(core.runner.seen) or undecided == 1
    assert core.metrics.steps >= len(core.runner.seen)


@pytest.mark.parametrize("seed", range(6))
def test_random_arrivals(seed):
    rng = random.Random(seed)
    proposers = [(PromptLookupProposer(2, 1), 4)] if seed % 2 else None
    core = make_core(blocks=rng.randrange(12, 30), proposers=proposers, batch_size_range=(1, rng.randrange(1, 4)))
    core.unwatched = core.runner.decodes = True
    run_with_arrivals(core, requests_of(rng, 25, temperature=0, ignore_eos=True), rng, None)


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": 1.0, "seed": 5},
        {"temperature": 0.8, "top_k": 9, "top_p": 0.8, "seed": 6},
        {"temperature": 0, "stop": ("AB", "Q"), "ignore_eos": True},
        {"temperature": 0, "stop_token_ids": tuple(range(3, VOCAB, 2)), "min_tokens": 12},
        {"temperature": 0.9, "seed": 2, "stop_token_ids": (3, 7), "min_tokens": 30},
        {"temperature": 0, "stop": ("C",), "include_stop": True, "min_tokens": 9},
        {"temperature": 0.9, "seed": 3, "logprobs": 2},
        {"temperature": 0.9, "seed": 3, "repetition_penalty": 1.3, "presence_penalty": 0.2},
        {"temperature": 0, "repetition_penalty": 1.4, "repetition_window": 20, "frequency_penalty": 0.3},
        {"temperature": 0, "repetition_penalty": 1.4, "repetition_window": 0},
        {"temperature": 0, "logit_bias": {4: 3.0}, "repetition_penalty": 1.1},
    ],
    ids=str,
)
def test_answers_are_those_of_single_steps(fields):
    made = []
    for decodes in (False, True):
        core = make_core(batch_size_range=(1, 2))
        core.unwatched, core.runner.decodes = True, decodes
        made.append(run(core, requests_of(random.Random(7), 10, **fields))[0])
    assert made[0] == made[1]


def test_logits_that_are_not_finite():
    core = make_core()
    core.unwatched = core.runner.decodes = True
    prompt = [4, 8, 15]
    text = expected(prompt, 30, None)
    core.runner.broken = {text[11]}
    answers, _ = run(core, [Request(prompt, SamplingParams(temperature=0, max_tokens=30, ignore_eos=True), id="a")])
    answer, first = answers["a"], text.index(text[11])
    assert answer.finish == "error" and "not finite" in answer.error and answer.token_ids == text[: first + 1]


def test_what_is_not_run_in_one_call():
    """Waiting requests, windows that slide and full blocks leave single steps."""
    calls = []
    core = make_core(batch_size_range=(1, 1))
    core.unwatched = core.runner.decodes = True
    decode = core.runner.decode
    core.runner.decode = lambda parts, call, **more: (calls.append(call.steps), decode(parts, call, **more))[1]
    greedy = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
    for name in ("a", "b"):
        core.add(Request([1, 2, 3], greedy, id=name))
    while core.requests == 2:
        core.step()
    assert not calls
    while not core.idle:
        core.step()
    assert calls and max(calls) <= 32
    sliding = make_core(cache_window=128)
    sliding.unwatched = sliding.runner.decodes = True
    sliding.runner.decode = None
    answers, _ = run(sliding, [Request([1, 2, 3], SamplingParams(temperature=0, max_tokens=200, ignore_eos=True), id="a")])
    assert len(answers["a"].token_ids) == 200


class Follower:
    """Proposes nothing, and keeps the states of every sequence: in the mock model, a row's state is its token."""

    name, wants_states = "follower", True

    def __init__(self):
        self.states = {}

    def ready(self, sequence):
        return False

    def follow(self, sequence, states):
        seen = self.states.setdefault(sequence.index, [])
        seen += states[:, 0].int().tolist()
        assert seen == sequence.tokens[: len(seen)] and len(seen) == sequence.cached

    def forget(self, sequence):
        self.states.pop(sequence.index, None)


@pytest.mark.parametrize("undecided", [0.0, 0.3])
def test_proposers_get_the_states_of_all_steps(undecided):
    follower = Follower()
    core = make_core(batch_size_range=(1, 3), proposers=[(follower, 3)])
    core.unwatched = core.runner.decodes = True
    core.runner.undecided = undecided
    requests = requests_of(random.Random(5), 9, temperature=0, ignore_eos=True)
    answers, steps = run(core, requests)
    assert all(answers[r.id].token_ids == expected(r.prompt, r.sampling.max_tokens, None) for r in requests)
    assert steps < len(core.runner.seen) and not follower.states
