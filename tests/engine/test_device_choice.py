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
    {"seed": 7, "frequency_penalty": 1.5, "presence_penalty": -0.25},
    {"seed": 8, "logit_bias": {3: 4.0, 5: -100}},
    {"seed": 9, "repetition_penalty": 1.3, "logprobs": 0, "min_p": 0.02},
    {"seed": 10, "repetition_penalty": 0.8, "repetition_window": 9, "frequency_penalty": 0.3, "logprobs": 3, "min_tokens": 5},
    {"seed": 11, "dry_multiplier": 0.8, "bad_words": ((4,), (1, 2))},
    {"seed": 12, "allowed_token_ids": tuple(range(3, 40))},
]
ON_HOST = [{"seed": 13, "mirostat": 2}, {"seed": 14, "typical_p": 0.8}, {"seed": 15, "logprobs": 2, "sampled_logprobs": True}]


def texts(proposers=None, elsewhere=False, samplings=(*SAMPLINGS, *ON_HOST)):
    """The answers to a set of requests, and the engine's metrics."""
    rng = random.Random(4)
    core = make_core(batch_size_range=(1, 8), proposers=proposers)
    core.runner.on_host = not elsewhere
    result = {}
    for n, sampling in enumerate((*samplings, *samplings)):
        prompt = [rng.randrange(VOCAB - 1) for _ in range(rng.randrange(1, 90))] * 2
        core.add(Request(prompt, SamplingParams(max_tokens=40, **sampling), id=str(n)))
        result[str(n)] = Completion()
    while not core.idle:
        for output in core.step():
            result[output.request_id].add(output)
    return result, core.metrics


def same_logprobs(made, exact):
    """The same tokens, with numbers that differ in their last bits."""
    if exact is None:
        return made is None
    pairs = zip(made, exact, strict=True)
    return all(
        a.token == b.token
        and a.logprob == pytest.approx(b.logprob, abs=1e-6)
        and [token for token, _ in a.top] == [token for token, _ in b.top]
        and [value for _, value in a.top] == pytest.approx([value for _, value in b.top], abs=1e-6)
        for a, b in pairs
    )


@pytest.mark.parametrize("drafts", [False, True])
def test_the_same_texts(drafts):
    proposers = [(PromptLookupProposer(2, 1), 4)] if drafts else None
    here, metrics = texts(proposers)
    assert metrics.copied_rows == 0
    there, metrics = texts(proposers, elsewhere=True)
    assert all(there[n].token_ids == here[n].token_ids for n in here)
    assert all(same_logprobs(there[n].logprobs, here[n].logprobs) for n in here)
    assert all(answer.finish in ("stop", "length") for answer in there.values())
    assert 0 < metrics.copied_rows < metrics.generated_tokens


def test_rows_cross_only_where_the_device_has_no_such_choice():
    _, metrics = texts(elsewhere=True, samplings=SAMPLINGS)
    assert metrics.copied_rows == 0
    answers, metrics = texts(elsewhere=True, samplings=ON_HOST)
    assert metrics.copied_rows == metrics.generated_tokens == sum(len(a.token_ids) for a in answers.values())


def test_what_changes_do_not_allow_is_found_out_on_the_host():
    core = make_core()
    core.runner.on_host = False
    core.runner.broken.add(9)
    core.add(Request([1, 9], SamplingParams(seed=1, max_tokens=5, presence_penalty=1.0), id="broken"))
    none = SamplingParams(seed=2, max_tokens=5, allowed_token_ids=(3,), logit_bias={3: -100})
    core.add(Request([1, 2], none, id="none"))
    core.add(Request([1, 2], SamplingParams(seed=3, max_tokens=5, presence_penalty=1.0), id="well"))
    ended = {}
    while not core.idle:
        ended.update({o.request_id: o for o in core.step() if o.finish})
    assert ended["broken"].finish == "error" and "not finite" in ended["broken"].error
    assert ended["none"].finish == "stop" and ended["none"].stop_reason == "no token is allowed"
    assert ended["well"].finish in ("stop", "length")


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
