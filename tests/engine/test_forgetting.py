"""The engine with a model that attends to a window and sinks: correct texts, in no more blocks than the window needs."""

from __future__ import annotations

import random

import pytest

from deepseek_optimizer import RequestError
from deepseek_optimizer.cache import HOLE, Forgetting
from deepseek_optimizer.engine.request import Request
from deepseek_optimizer.engine.speculative.prompt_lookup import PromptLookupProposer
from support.engine_runs import endless, run, run_and_count, text
from support.mock_model import EOS, VOCAB, blocks_in_use, expected, make_core, next_token, places, run_with_arrivals
from support.scripted_proposer import ScriptedProposer

WINDOW = Forgetting(window=100, sinks=4, spare=32)


@pytest.mark.parametrize("options", [{}, {"prefix_cache": False}, {"step_tokens": 40}, {"chunk": 64}])
def test_a_prompt_longer_than_the_cache(options):
    """100,000 tokens and the text after them, with the blocks of a window and a step."""
    step = options.get("step_tokens", 512)
    core = make_core(blocks=WINDOW.blocks(step) + 2, context=200_000, forgetting=WINDOW, **options)
    prompt = text(0, 5_000 if options else 100_000)
    actual, max_blocks = run_and_count(core, Request(prompt, endless(90), id="a"))
    assert actual["a"].token_ids == expected(prompt, 90, None, WINDOW)
    assert max_blocks <= WINDOW.blocks(step) and core.scheduler.preemptions == 0
    assert core.memory.manager.high_water <= WINDOW.blocks(step) + 2
    assert blocks_in_use(core) == 0


def test_the_prefix_cache_keeps_only_a_window():
    core = make_core(blocks=400, context=200_000, forgetting=WINDOW)
    run(core, Request(text(0, 10_000), endless(3), id="a"))
    assert len(core.prefix) <= WINDOW.blocks(512)
    assert core.memory.manager.high_water <= WINDOW.blocks(512) + 2


def test_another_question_about_the_same_text():
    """A processed text is matched by its end, although its beginning was dropped."""
    core = make_core(blocks=100, context=200_000, forgetting=WINDOW)
    document = text(0, 3_200)
    first, second = document + text(1, 20), document + text(2, 30)
    actual = run(core, Request(first, endless(300), id="a"))
    again = run(core, Request(second, endless(40), id="b"))
    assert actual["a"].token_ids == expected(first, 300, None, WINDOW)
    assert again["b"].token_ids == expected(second, 40, None, WINDOW)
    assert again["b"].cached_tokens == 3_200  # for an answer of any length
    assert core.memory.manager.num_blocks - core.memory.manager.free_blocks <= 3 * WINDOW.blocks(0)
    shorter = run(core, Request(document[:1_600], endless(20), id="c"))
    assert shorter["c"].token_ids == expected(document[:1_600], 20, None, WINDOW)
    assert shorter["c"].cached_tokens == 32  # the sinks' block only: the end of the shorter text was dropped


def test_two_prompts_with_the_same_text():
    core = make_core(blocks=200, context=200_000, forgetting=WINDOW, step_tokens=64)
    document = text(0, 2_000)
    requests = [Request(document + text(n, 9), endless(30), id=str(n)) for n in range(1, 4)]
    actual = run(core, *requests)
    for request in requests:
        assert actual[request.id].token_ids == expected(request.prompt, 30, None, WINDOW)
    assert blocks_in_use(core) == 0


@pytest.mark.parametrize("seed", range(12))
def test_random_batches_in_a_small_cache(seed):
    """Requests arrive, are cancelled and preempted at random, with and without rejected drafts."""
    rng = random.Random(seed)
    forgetting = Forgetting(rng.randrange(20, 150), rng.randrange(0, 40), rng.choice((0, 32)))
    script = {}
    proposers = [(ScriptedProposer(script, 0.6, VOCAB, seed), 3)] if seed % 2 else None
    core = make_core(
        blocks=rng.randrange(24, 40), chunk=rng.choice([None, 32, 64]), proposers=proposers, forgetting=forgetting,
        step_tokens=rng.choice([64, 128, 512]), batch_size_range=(1, rng.randrange(2, 9)), stall=rng.choice([None, 3.0]),
    )  # fmt: skip
    shared = [text(1000 * seed + n, rng.randrange(50, 500)) for n in range(3)]
    requests = []
    for n in range(40):
        prompt = rng.choice(shared) + text(n, rng.randrange(1, 60)) if rng.random() < 0.6 else text(n, rng.randrange(1, 400))
        max_tokens, salt = rng.randrange(1, 120), rng.choice(["", "a"])
        requests.append(Request(prompt, endless(max_tokens), id=str(n), priority=rng.randrange(3), salt=salt))
        script[n + 1] = prompt + expected(prompt, max_tokens, None, forgetting)
    run_with_arrivals(core, requests, rng, forgetting)


def test_drafts_from_the_text():
    core = make_core(
        blocks=WINDOW.blocks(512) + 2, context=200_000, forgetting=WINDOW, proposers=[(PromptLookupProposer(2, 1), 8)]
    )
    prompt = text(0, 50) * 8
    actual = run(core, Request(prompt, endless(2_000), id="a"))
    assert actual["a"].token_ids == expected(prompt, 2_000, None, WINDOW)


def test_a_cache_that_cannot_hold_a_window_and_a_step():
    """Then the whole prompt must fit."""
    core = make_core(blocks=WINDOW.blocks(512) - 1, context=200_000, forgetting=WINDOW)
    with pytest.raises(RequestError, match="kv_cache_memory"):
        core.check(Request(text(0, 5_000), endless(1), id="a"))
    assert core.check(Request(text(0, 300), endless(1), id="a")) == 1
    roomy = make_core(blocks=WINDOW.blocks(512), context=6_000, forgetting=WINDOW)
    assert roomy.check(Request(text(0, 5_000), endless(1_000), id="a")) == 1_000
    with pytest.raises(RequestError, match="this model's maximum context length is 6000"):
        roomy.check(Request(text(0, 5_001), endless(1_000), id="a"))


def test_many_long_prompts_are_admitted_together():
    """Their blocks are counted, not their lengths."""
    core = make_core(blocks=4 * (WINDOW.blocks(64) + 2), context=200_000, forgetting=WINDOW, step_tokens=64, prefix_cache=False)
    for n in range(4):
        core.add(Request(text(n, 2_000), endless(3), id=str(n)))
    core.step()
    assert len(core.scheduler.running) == 4
    while not core.idle:
        core.step()
    assert core.scheduler.preemptions == 0


def test_an_embedding_of_a_long_text():
    core = make_core(blocks=WINDOW.blocks(512) + 2, context=200_000, forgetting=WINDOW)
    prompt = text(0, 20_000)
    core.add(Request(prompt, id="a", embed=True))
    outputs = []
    while not core.idle:
        outputs += core.step()
    assert outputs[-1].embedding == pytest.approx([sum(prompt) / len(prompt)], rel=1e-4)


@pytest.mark.parametrize("drafts", [False, True])
def test_an_endless_conversation(drafts):
    """Positions slide within the model's context while attention has its own window, in which pinned tokens are not visible."""
    proposers = [(PromptLookupProposer(2, 1), 4)] if drafts else None
    core = make_core(blocks=40, context=512, cache_window=400, sinks=70, proposers=proposers, forgetting=WINDOW)
    prompt = text(3, 1_500)
    core.add(Request(prompt, endless(1_000), id="a", pinned=((0, 130),)))
    (running,) = core.scheduler.waiting
    dropped = 0
    while not core.idle:
        for output in core.step():
            context, new = list(running.sequence.tokens), output.token_ids
            for n in range(len(new)):
                before = context[: len(context) - len(new) + n]
                assert new[n] == next_token([before[place] for place in places(len(before), WINDOW)])
            dropped = output.dropped_tokens
        if running.sequence.cached:
            assert running.sequence.cached <= 400 and running.sequence.tokens[:4] == prompt[:4]
    assert dropped >= 1_500 + 1_000 - 400 and blocks_in_use(core) == 0


def test_dropped_tokens_are_invisible():
    core = make_core(blocks=40, context=2_000, forgetting=WINDOW, step_tokens=64)
    core.add(Request(text(0, 500), endless(5), id="a"))
    (running,) = core.scheduler.waiting
    while running.generated < 2:
        core.step()
    assert running.sequence.blocks.blocks.count(HOLE) == (running.sequence.cached - 32 + 1 - 100) // 32 - 1
    assert EOS not in running.sequence.tokens[:500]
