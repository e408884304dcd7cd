"""Tokens chosen on the device of the logits: the same texts, and no row of logits is copied that nobody needs."""

import random

import pytest

from deepseek_optimizer.engine.engine import Completion
from deepseek_optimizer.engine.request import Request, SamplingParams
from deepseek_optimizer.engine.speculative.prompt_lookup import PromptLookupProposer
from support.mock_model import VOCAB, make_core

SAMPLINGS = [
    {"temperature": 0},
    {"temperature": 0, "min_tokens": 7},
    {"temperature": 0, "logprobs": 2},
    {"seed": 5},
    {"seed": 6, "temperature": 0.8, "top_k": 3, "top_p": 0.9},
    {"seed": 7, "frequency_penalty": 1.5},
    {"seed": 8, "logit_bias": {3: 4.0}},
]


def texts(proposers=None, elsewhere=False):
    """The answers to a set of requests, and the rows of logits transferred in each step."""
    rng, crossed = random.Random(4), []
    core = make_core(batch_size_range=(1, 8), proposers=proposers)
    if elsewhere:
        on_host = core.runner.choose_tokens

        def choose(logits, choices):
            tokens, rows = on_host(logits, choices)
            crossed.append((len(choices), [n for n, choice in enumerate(choices) if choice is None]))
            return tokens, {n: rows[n] for n in crossed[-1][1]}

        core.runner.on_host, core.runner.choose_tokens = False, choose
    result = {}
    for n, sampling in enumerate(SAMPLINGS * 2):
        prompt = [rng.randrange(VOCAB - 1) for _ in range(rng.randrange(1, 90))] * 2
        core.add(Request(prompt, SamplingParams(max_tokens=40, **sampling), id=str(n)))
        result[str(n)] = Completion()
    while not core.idle:
        for output in core.step():
            result[output.request_id].add(output)
    return result, crossed


@pytest.mark.parametrize("drafts", [False, True])
def test_the_same_texts(drafts):
    proposers = [(PromptLookupProposer(2, 1), 4)] if drafts else None
    here, _ = texts(proposers)
    there, crossed = texts(proposers, elsewhere=True)
    assert all(there[n].token_ids == here[n].token_ids and there[n].logprobs == here[n].logprobs for n in here)
    assert all(answer.finish in ("stop", "length") for answer in there.values())
    assert 0 < sum(len(rows) for _, rows in crossed) < sum(count for count, _ in crossed)


def test_plain_requests_transfer_no_logits():
    core = make_core()
    on_host = core.runner.choose_tokens
    core.runner.choose_tokens = lambda logits, choices: (on_host(logits, choices)[0], {})
    core.add(Request([1, 2, 3], SamplingParams(temperature=0, max_tokens=12), id="greedy"))
    core.add(Request([4, 5], SamplingParams(seed=3, top_p=0.9, max_tokens=12), id="sampled"))
    outputs = []
    while not core.idle:
        outputs += core.step()
    assert {output.finish for output in outputs} <= {None, "stop", "length"}


def test_non_finite_logits_fail_only_their_request():
    core = make_core()
    core.runner.broken.add(9)
    core.add(Request([1, 9], SamplingParams(temperature=0, max_tokens=5), id="broken"))
    core.add(Request([1, 2], SamplingParams(temperature=0, max_tokens=5), id="well"))
    ended = {}
    while not core.idle:
        ended.update({o.request_id: o for o in core.step() if o.finish})
    assert ended["broken"].finish == "error" and "not finite" in ended["broken"].error
    assert ended["well"].finish in ("stop", "length")
