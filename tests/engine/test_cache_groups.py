"""The engine with a model that has full and windowed layers: correct texts, and only the blocks that are needed."""

from __future__ import annotations

import random

import pytest

from deepseek_optimizer import RequestError
from deepseek_optimizer.cache import HOLE, Forgetting
from deepseek_optimizer.cache.forgetting import max_blocks
from deepseek_optimizer.engine.engine import Completion
from deepseek_optimizer.engine.request import Request
from support.engine_runs import endless, run, run_and_count, text
from support.mock_model import VOCAB, blocks_in_use, expected, make_core, run_with_arrivals
from support.scripted_proposer import ScriptedProposer

WINDOW = Forgetting(window=100, sinks=0, spare=64)
GROUPS = (None, *(WINDOW,) * 5)  # five of six layers have a window


@pytest.mark.parametrize("options", [{}, {"prefix_cache": False}])
def test_a_long_prompt_takes_what_its_groups_need(options):
    """3,000 tokens: 94 blocks of the full group, and at most a window and a step of each other one, of 564 without groups."""
    needed = max_blocks(GROUPS, 3_100, 64)
    core = make_core(blocks=needed + len(GROUPS), context=3_200, forgetting=GROUPS, step_tokens=64, **options)
    prompt = text(0, 3_000)
    actual, most = run_and_count(core, Request(prompt, endless(90), id="a"))
    assert actual["a"].token_ids == expected(prompt, 90, None, GROUPS)
    assert most <= needed == 97 + 5 * 9 and core.scheduler.preemptions == 0 and blocks_in_use(core) == 0


def test_how_many_tokens_fit():
    """With released blocks, several times the tokens fit; more are refused when a request arrives."""
    core = make_core(blocks=97 + 5 * WINDOW.blocks(64), context=10_000, forgetting=GROUPS, step_tokens=64)
    assert core.room == core.cache_tokens == 97 * 32 > 3 * core.blocks // 6 * 32
    actual = run(core, Request(text(0, 3_000), endless(104), id="a"))
    assert actual["a"].finish == "length" and len(actual["a"].token_ids) == 104
    with pytest.raises(RequestError, match="3104 tokens"):
        core.check(Request(text(0, 3_000), endless(105), id="b"))
    small = make_core(blocks=12, context=10_000, forgetting=GROUPS)
    assert small.room == 64


def test_several_long_texts_run_together():
    """Admission counts what the groups of all requests really need: four requests fit, without groups less than two."""
    each = max_blocks(GROUPS, 1_030, 64) + len(GROUPS)
    assert 2 * each < 33 * len(GROUPS)
    core = make_core(blocks=4 * each, context=2_000, forgetting=GROUPS, step_tokens=64, batch_size_range=(1, 4))
    requests = [Request(text(n, 1_000), endless(20), id=str(n)) for n in range(4)]
    together = 0
    for request in requests:
        core.add(request)
    answers = {r.id: Completion() for r in requests}
    while not core.idle:
        for output in core.step():
            answers[output.request_id].add(output)
        together = max(together, len(core.scheduler.running))
    assert together == 4 and core.scheduler.preemptions == 0
    assert all(answers[r.id].token_ids == expected(r.prompt, 20, None, GROUPS) for r in requests)


def test_requests_past_their_prompt_reserve_no_further_step():
    """A request whose prompt has been processed needs no blocks of windowed groups for another chunk."""
    after, during = 10 + 5 * WINDOW.blocks(1), 6 * 10
    core = make_core(blocks=3 * (after + 6) + during + 6, forgetting=GROUPS, prefix_cache=False, batch_size_range=(1, 4))
    requests, answers = [Request(text(n, 300), endless(15), id=str(n)) for n in range(4)], {}
    for request in requests:
        core.add(request)
        answers[request.id] = Completion()
        for output in core.step():
            answers[output.request_id].add(output)
    assert len(core.scheduler.running) == 4
    while not core.idle:
        for output in core.step():
            answers[output.request_id].add(output)
    assert core.scheduler.preemptions == 0
    assert all(answers[r.id].token_ids == expected(r.prompt, 15, None, GROUPS) for r in requests)


def test_prefixes_of_any_length_are_shared_while_there_is_room():
    """Released blocks stay in the prefix cache as long as nothing else needs them: a text may branch off anywhere."""
    core = make_core(blocks=1_000, context=5_000, forgetting=GROUPS, step_tokens=64)
    document = text(0, 2_000)
    run(core, Request(document, endless(5), id="a"))
    for n, length in enumerate((320, 1_000, 1_984)):
        prompt = document[:length] + text(n + 1, 40)
        actual = run(core, Request(prompt, endless(10), id=str(n)))
        assert actual[str(n)].cached_tokens == length // 32 * 32
        assert actual[str(n)].token_ids == expected(prompt, 10, None, GROUPS)


def test_released_blocks_make_room_for_others():
    """A cache that holds little more than one text: its released blocks are evicted, those for a next question stay."""
    core = make_core(blocks=max_blocks(GROUPS, 2_100, 64) + 40, context=5_000, forgetting=GROUPS, step_tokens=64)
    document = text(0, 2_000)
    run(core, Request(document + text(1, 20), endless(30), id="a"))
    other = text(5, 200)
    actual = run(core, Request(other, endless(8), id="b"))
    assert actual["b"].token_ids == expected(other, 8, None, GROUPS) and core.scheduler.preemptions == 0
    question = document + text(2, 30)
    actual = run(core, Request(question, endless(8), id="c"))
    assert actual["c"].cached_tokens == 1_984 and actual["c"].token_ids == expected(question, 8, None, GROUPS)
    shorter = document[:1_000] + text(3, 9)
    actual = run(core, Request(shorter, endless(8), id="d"))
    assert actual["d"].cached_tokens < 992 and actual["d"].token_ids == expected(shorter, 8, None, GROUPS)


@pytest.mark.parametrize("seed", range(10))
def test_random_batches_in_a_small_cache(seed):
    """Requests arrive, are cancelled and preempted at random, with and without rejected drafts and recurrent states."""
    rng = random.Random(seed)
    windows = [Forgetting(rng.randrange(20, 150), rng.choice((0, 0, 40)), rng.choice((8, 32))) for _ in range(2)]
    groups = (None, *windows[: rng.randint(1, 2)])
    script = {}
    proposers = [(ScriptedProposer(script, 0.6, VOCAB, seed), 3)] if seed % 2 else None
    core = make_core(
        blocks=rng.randrange(55, 90), chunk=rng.choice([None, 32, 64]), proposers=proposers, forgetting=groups,
        step_tokens=rng.choice([64, 128, 512]), batch_size_range=(1, rng.randrange(2, 9)), stall=rng.choice([None, 3.0]),
        prefix_cache=rng.random() < 0.8, slots=rng.choice((0, 0, 60)),
    )  # fmt: skip
    shared = [text(1000 * seed + n, rng.randrange(50, 500)) for n in range(3)]
    requests = []
    for n in range(30):
        prompt = rng.choice(shared) + text(n, rng.randrange(1, 60)) if rng.random() < 0.6 else text(n, rng.randrange(1, 400))
        max_tokens, salt = rng.randrange(1, 80), rng.choice(["", "a"])
        requests.append(Request(prompt, endless(max_tokens), id=str(n), priority=rng.randrange(3), salt=salt))
        script[n + 1] = prompt + expected(prompt, max_tokens, None, groups)
    run_with_arrivals(core, requests, rng, groups)
    if core.prefix is not None:
        core.prefix.clear()
    assert core.memory.manager.free_blocks == core.memory.manager.num_blocks


def test_a_window_of_the_cache_keeps_all_blocks():
    """With a cache window, what windowed layers had released would be visible again after it has slid: nothing is released."""
    core = make_core(blocks=90, context=4_000, forgetting=(None, WINDOW), cache_window=400, sinks=4)
    core.add(Request(text(0, 60), endless(1_500), id="a"))
    output = Completion()
    while not core.idle:
        for out in core.step():
            output.add(out)
        for running in core.scheduler.running:
            first, second = (table.blocks for table in running.sequence.blocks.tables)
            assert HOLE not in second and len(first) == len(second) <= 13
    assert output.finish == "length" and len(output.token_ids) == 1_500 and output.dropped_tokens > 1_000
    assert blocks_in_use(core) == 0
