"""The engine over a model with recurrent states: each text is its own, and prefixes continue from stored states."""

from __future__ import annotations

import random

import pytest

from deepseek_optimizer.engine.request import Request
from deepseek_optimizer.engine.speculative.prompt_lookup import PromptLookupProposer
from support.engine_runs import endless, run, text
from support.mock_model import VOCAB, blocks_in_use, expected, make_core
from support.scripted_proposer import ScriptedProposer


def slots_in_use(core) -> int:
    """Slots that are neither free nor held by the prefix cache alone."""
    slots = core.memory.manager.slots
    return slots.num_blocks - slots.free_blocks - (core.prefix.unused_states if core.prefix else 0)


@pytest.mark.parametrize("options", [{}, {"prefix_cache": False}, {"step_tokens": 7}, {"chunk": 32}, {"slots": 9}])
@pytest.mark.parametrize("drafts", [False, True])
def test_every_request_gets_its_own_text(options, drafts):
    rng = random.Random(1)
    proposers = [(PromptLookupProposer(2, 1), 4)] if drafts else None
    core = make_core(proposers=proposers, batch_size_range=(1, 8), **{"slots": 40, **options})
    prompts = [text(n, rng.randrange(1, 150)) for n in range(20)]
    prompts += [[*prompts[0], 1, 2, 3], prompts[0], prompts[0]]
    requests = [Request(p, endless(rng.randrange(1, 60)), id=str(n)) for n, p in enumerate(prompts)]
    answers = run(core, *requests)
    for request in requests:
        assert answers[request.id].token_ids == expected(request.prompt, request.sampling.max_tokens, None)
    assert blocks_in_use(core) == 0 and slots_in_use(core) == 0


@pytest.mark.parametrize("seed", range(8))
def test_little_room_for_blocks_and_states(seed):
    rng = random.Random(seed)
    script = {}
    proposers = [(ScriptedProposer(script, 0.6, VOCAB, seed), 3)] if seed % 2 else None
    core = make_core(
        blocks=rng.randrange(10, 24), slots=rng.randrange(3, 16), chunk=rng.choice([None, 32, 64]), proposers=proposers,
        step_tokens=rng.choice([16, 64, 512]), batch_size_range=(1, rng.randrange(2, 12)),
    )  # fmt: skip
    shared = [text(100 + n, rng.randrange(1, 150)) for n in range(3)]
    requests = []
    for n in range(40):
        prompt = rng.choice(shared) + text(n, 40) if rng.random() < 0.6 else text(n, rng.randrange(1, 150))
        requests.append(Request(prompt, endless(rng.randrange(1, 80)), id=str(n), client=rng.choice(["", "", "b"])))
        script[n + 1] = prompt + expected(prompt, requests[-1].sampling.max_tokens, None)
    answers = run(core, *requests)
    for request in requests:
        assert answers[request.id].token_ids == expected(request.prompt, request.sampling.max_tokens, None)
    assert blocks_in_use(core) == 0 and slots_in_use(core) == 0


def test_the_next_turn_of_a_conversation_continues_from_the_last_token():
    core = make_core(slots=8)
    first = text(1, 200)
    answer = run(core, Request(first, endless(50), id="1"))["1"].token_ids
    again = run(core, Request([*first, *answer, 5, 6], endless(5), id="2"))["2"]
    assert again.cached_tokens == 249  # all that were processed: the last token of the answer was not
    assert again.token_ids == expected([*first, *answer, 5, 6], 5, None)
    edited = run(core, Request([*first, 7, 8], endless(5), id="3"))["3"]  # the first answer is replaced
    assert edited.cached_tokens == 192 and edited.token_ids == expected([*first, 7, 8], 5, None)


def test_prompts_that_begin_alike_share_states_at_regular_intervals():
    core = make_core(slots=32)
    shared = text(1, 150)
    run(core, Request([*shared, *text(2, 100)], endless(5), id="1"))
    other = run(core, Request([*shared, *text(3, 100)], endless(5), id="2"))["2"]
    assert other.cached_tokens == 128 and other.token_ids == expected([*shared, *text(3, 100)], 5, None)


@pytest.mark.parametrize("step_tokens", [32, 50, 64, 512])
def test_states_of_earlier_steps_of_a_prompt_are_shared(step_tokens):
    """Only the last step of a prompt shows that its states are valid."""
    core = make_core(slots=64, step_tokens=step_tokens)
    shared = text(1, 700)
    run(core, Request([*shared, *text(2, 300)], endless(5), id="1"))
    other = run(core, Request([*shared, *text(3, 100)], endless(5), id="2"))["2"]
    assert other.cached_tokens == 640 and other.token_ids == expected([*shared, *text(3, 100)], 5, None)
    assert slots_in_use(core) == 0


def test_states_of_a_prompt_that_ends_early_are_not_shared():
    core = make_core(slots=64, step_tokens=64)
    shared = text(1, 700)
    core.add(Request([*shared, *text(2, 300)], endless(5), id="1"))
    for _ in range(5):
        core.step()
    core.cancel("1")
    core.step()
    answer = run(core, Request([*shared, *text(3, 100)], endless(5), id="2"))["2"]
    assert answer.cached_tokens == 0 and answer.token_ids == expected([*shared, *text(3, 100)], 5, None)
    assert slots_in_use(core) == 0


def test_the_same_prompt_twice_at_once_is_processed_once():
    core = make_core(slots=32, step_tokens=64)
    prompt = text(1, 300)
    answers = run(core, Request(prompt, endless(5), id="1"), Request(prompt, endless(5), id="2"))
    assert [answers[n].cached_tokens for n in "12"] == [0, 288]


def test_a_preempted_request_continues_from_its_stored_states():
    core = make_core(blocks=12, slots=16, batch_size_range=(1, 4))
    requests = [Request(text(n, 100), endless(100), id=str(n), priority=n) for n in range(3)]
    answers = run(core, *requests)
    assert core.scheduler.preemptions
    for request in requests:
        assert answers[request.id].token_ids == expected(request.prompt, 100, None)
