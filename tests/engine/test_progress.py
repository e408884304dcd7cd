"""`Output.progress`: how much of a prompt has been processed, step by step, with cached prefixes and preemption."""

import random

import pytest

from deepseek_optimizer.engine.async_engine import merged
from deepseek_optimizer.engine.request import Output, Request, SamplingParams
from support.mock_model import VOCAB, make_core

SAMPLING = SamplingParams(temperature=0, max_tokens=3, ignore_eos=True)


def outputs_of(core, *requests):
    """The outputs of each request, by id."""
    found = {request.id: [] for request in requests}
    for request in requests:
        core.add(request)
    while not core.idle:
        for output in core.step():
            found[output.request_id].append(output)
    return found


def prompt(length, seed=0):
    rng = random.Random(seed)
    return [rng.randrange(VOCAB - 1) for _ in range(length)]


def test_each_step_with_a_part_of_the_prompt_is_reported():
    core = make_core(step_tokens=32)
    outputs = outputs_of(core, Request(prompt(100), SAMPLING, id="a", progress=True))["a"]
    assert [output.progress for output in outputs] == [(0, 32), (64,), (96,), (100,), (), ()]
    assert [len(output.token_ids) for output in outputs] == [0, 0, 0, 1, 1, 1]
    assert all(output.prompt_tokens == 100 for output in outputs)


def test_cached_tokens_come_first():
    core = make_core(step_tokens=32)
    outputs_of(core, Request(prompt(100), SAMPLING, id="a"))
    outputs = outputs_of(core, Request(prompt(100), SAMPLING, id="b", progress=True))["b"]
    cached = outputs[0].cached_tokens
    assert cached >= 64 and outputs[0].progress == (cached, 100)


def test_others_report_nothing():
    outputs = outputs_of(make_core(step_tokens=32), Request(prompt(100), SAMPLING, id="a"))["a"]
    assert len(outputs) == 3 and not any(output.progress for output in outputs)


@pytest.mark.parametrize("seed", range(4))
def test_counts_rise_even_if_requests_are_preempted(seed):
    core = make_core(blocks=12, step_tokens=32, batch_size_range=(1, 4))
    requests = [Request(prompt(90, 10 * seed + n), SAMPLING, id=str(n), progress=True) for n in range(6)]
    for outputs in outputs_of(core, *requests).values():
        counts = [count for output in outputs for count in output.progress]
        assert counts == sorted(set(counts)) and counts[-1] == 90
        assert sum(len(output.token_ids) for output in outputs) == 3


def test_outputs_that_were_not_read_are_merged():
    first, then = Output("a", progress=(0, 32)), Output("a", token_ids=[1], progress=(64,))
    assert merged(first, then).progress == (0, 32, 64)
