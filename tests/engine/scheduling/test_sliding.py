"""Sliding windows in the engine: conversations continue in bounded memory, pinned tokens stay, and dropped ones are
reported."""

import random

import pytest

from deepseek_optimizer import RequestError
from deepseek_optimizer.cache.block_manager import BLOCK_TOKENS
from deepseek_optimizer.engine.request import Request
from deepseek_optimizer.engine.speculative.prompt_lookup import PromptLookupProposer
from support.engine_runs import endless
from support.mock_model import VOCAB, blocks_in_use, make_core, next_token


@pytest.mark.parametrize("drafts", [False, True])
@pytest.mark.parametrize("options", [{}, {"prefix_cache": False}, {"step_tokens": 40}])
def test_a_conversation_continues_in_its_window(options, drafts):
    """Each token depends on the content of the window at that time; sinks and pinned tokens stay to the end."""
    proposers = [(PromptLookupProposer(2, 1), 4)] if drafts else None
    core = make_core(blocks=40, context=512, cache_window=320, sinks=4, proposers=proposers, **options)
    rng = random.Random(3)
    prompt = [rng.randrange(VOCAB) for _ in range(1_500)]  # five times the window
    core.add(Request(prompt, endless(1_000), id="a", pinned=((100, 130),)))
    (running,) = core.scheduler.waiting
    contexts, dropped, last = [], 0, None
    while not core.idle:
        before = list(running.sequence.tokens)
        for output in core.step():
            context = list(running.sequence.tokens)
            new = output.token_ids
            if dropped == output.dropped_tokens and len(context) > len(new):
                assert context[: len(before)] == before
            for n in range(len(new)):
                assert new[n] == next_token(context[: len(context) - len(new) + n])
            dropped, last = output.dropped_tokens, output
        if running.sequence.cached:
            contexts.append(running.sequence.cached)
            assert running.sequence.tokens[:4] == prompt[:4]
            begin, end = running.pinned[0]
            assert running.sequence.tokens[begin:end] == prompt[100:130]
    assert max(contexts) <= 320 and last.completion_tokens == 1_000 and last.finish == "length"
    assert last.dropped_tokens >= 1_500 + 1_000 - 320 and last.dropped_tokens % BLOCK_TOKENS == 0
    assert blocks_in_use(core) == 0


def test_moved_blocks_are_not_shared():
    """A block's content depends on dropped tokens too, so its own tokens alone must not match it in the prefix cache."""
    core = make_core(blocks=60, context=512, cache_window=256)
    rng = random.Random(0)
    prompt = [rng.randrange(VOCAB) for _ in range(600)]
    for name in ("a", "b"):
        core.add(Request(prompt, endless(200), id=name))
        texts = []
        while not core.idle:
            texts += [t for o in core.step() for t in o.token_ids]
        if name == "a":
            first = texts
    assert texts == first
    assert blocks_in_use(core) == 0


def test_windows_shrink_before_requests_are_preempted():
    core = make_core(blocks=100, context=4_000, cache_window=3_000, prefix_cache=False, batch_size_range=(2, 2))
    core.add(Request([1] * 2_900, endless(300), id="long"))
    core.add(Request([2] * 900, endless(100), id="other"))
    outputs = {}
    while not core.idle:
        for output in core.step():
            outputs[output.request_id] = output
    assert core.scheduler.preemptions == 0 and outputs["long"].dropped_tokens > 0
    assert outputs["other"].completion_tokens == 100 and outputs["long"].completion_tokens == 300


@pytest.mark.parametrize("seed", range(20))
def test_windows_shrink_during_prefill(seed):
    """Blocks are taken at random: windows shrink during steps; requests without blocks fail or continue."""
    rng = random.Random(seed)
    core = make_core(blocks=170, context=4_000, cache_window=rng.choice([2_000, 3_000]), batch_size_range=(3, 3),
                     prefix_cache=seed % 2 == 0, step_tokens=rng.choice([64, 512]))  # fmt: skip
    wanted = [Request([n] * rng.randrange(500, 2_500), endless(rng.randrange(50, 300)), id=str(n)) for n in range(4)]
    wanted.append(Request([9] * 1_500, id="embed", embed=True))
    for request in wanted:
        core.add(request)
    actual, held = {}, []
    while not core.idle:
        with core.memory.locked() as manager:
            if rng.random() < 0.1 and manager.free_blocks > 8:
                held += manager.allocate(rng.randrange(8))
            elif held and rng.random() < 0.2:
                manager.release(held.pop())
        actual |= {o.request_id: o for o in core.step()}
    for request in wanted[:-1]:
        output = actual[request.id]
        assert output.finish == "length" and output.completion_tokens == request.sampling.max_tokens or output.transient
    assert actual["embed"].transient or actual["embed"].embedding == pytest.approx([9.0])
    assert actual["embed"].dropped_tokens == 0
    assert blocks_in_use(core) == len(held)


def test_a_window_that_is_all_pinned_does_not_shrink():
    core = make_core(blocks=100, context=4_000, cache_window=3_000, prefix_cache=False, batch_size_range=(2, 2))
    core.add(Request([1] * 2_000, endless(300), id="long", pinned=((0, 2_000),)))
    core.add(Request([2] * 1_000, endless(300), id="other"))
    outputs = {}
    while not core.idle:
        for output in core.step():
            outputs[output.request_id] = output
    assert core.scheduler.preemptions > 0 and outputs["long"].dropped_tokens == 0
    assert all(output.completion_tokens == 300 for output in outputs.values())


@pytest.mark.parametrize("seed", range(6))
def test_windows_in_a_mixed_batch(seed):
    """Little memory, prompts of all lengths, common prefixes: no block leaks, and all requests finish."""
    rng = random.Random(seed)
    core = make_core(blocks=rng.randrange(30, 60), context=1_000, cache_window=rng.choice([256, 500]), batch_size_range=(1, 6),
                     step_tokens=rng.choice([32, 256]))  # fmt: skip
    shared = [rng.randrange(VOCAB) for _ in range(300)]
    wanted = [
        Request(shared + [n] * rng.randrange(1, 500), endless(rng.randrange(1, 300)), id=str(n), priority=rng.randrange(2))
        for n in range(14)
    ]
    for request in wanted:
        core.add(request)
    actual = {}
    while not core.idle:
        actual |= {o.request_id: o for o in core.step()}
    for request in wanted:
        output = actual[request.id]
        assert output.finish == "length" and output.completion_tokens == request.sampling.max_tokens
    assert blocks_in_use(core) == 0


def test_requests_that_leave_no_room_are_rejected():
    core = make_core(blocks=40, context=512, cache_window=256)
    with pytest.raises(RequestError, match="pinned"):
        core.check(Request([1] * 400, endless(5), pinned=((0, 250),)))
    with pytest.raises(RequestError, match="after the prompt"):
        core.check(Request([1] * 40, endless(5), pinned=((30, 50),)))
    with pytest.raises(RequestError, match="the window"):
        core.check(Request([1] * 300, embed=True))
    assert core.check(Request([1] * 100_000, endless(10**6))) == 10**6
