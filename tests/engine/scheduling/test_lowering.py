"""When requests start at the lowest quality that they allow: the rule, and an engine under load."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest

from deepseek_optimizer.engine.request import MAX_PRIORITY, Request, SamplingParams
from deepseek_optimizer.engine.scheduling.lowering import Lowering
from deepseek_optimizer.errors import RequestError
from support.mock_model import make_core


def waiting(arrived: float, **fields):
    request = Request([1, 2, 3], **fields)
    sequence = SimpleNamespace(quality=request.quality or "exact")
    return SimpleNamespace(
        request=request, sequence=sequence, arrived=arrived, started=None, preempted=0, keys=[b"key"], restored=True
    )


def test_requests_are_lowered_while_another_waits_too_long_and_for_a_while_after():
    lowering = Lowering(1.0)
    old = waiting(0.0)

    def at(now, *requests, preemptions=0):
        lowering.choose([old, *requests], preemptions, now)
        return [r.sequence.quality for r in requests]

    def new(now):
        return waiting(now, quality="exact", min_quality="fast")

    assert at(0.9, new(0.9)) == ["exact"] and not lowering.active
    assert at(1.1, new(1.1)) == ["fast"]
    old = waiting(1.2)  # the queue is short now
    assert at(1.3, new(1.3)) == ["fast"], "not at once"
    old = waiting(4.6)
    assert at(5.2, new(5.2)) == ["fast"], "a wait above half of the limit begins the time anew"
    old = waiting(5.3)
    assert at(5.4, new(5.4)) == ["fast"]
    old = waiting(9.3)
    assert at(9.3, new(9.3)) == ["fast"] and at(9.5, new(9.5)) == ["exact"] and not lowering.active
    assert at(9.6, new(9.6), preemptions=1) == ["fast"], "a preemption means that the cache is full"


def test_waits_of_the_lowest_priority_lower_nothing():
    """Those of batches: they wait for all others, however few these are."""
    lowering = Lowering(1.0)
    batch = waiting(0.0, min_quality="fast", priority=MAX_PRIORITY)
    new = waiting(99.0, min_quality="fast")
    lowering.choose([batch, new], 0, 99.5)
    assert not lowering.active and new.sequence.quality == batch.sequence.quality == "exact"
    lowering.choose([batch, new, waiting(98.0, priority=MAX_PRIORITY - 1)], 0, 99.6)
    assert lowering.active and new.sequence.quality == batch.sequence.quality == "fast"


def test_a_request_that_waits_follows_and_gives_up_its_keys():
    lowering, r = Lowering(1.0), waiting(0.0, quality="balanced", min_quality="fast")
    lowering.choose([r], 0, 0.5)
    assert r.sequence.quality == "balanced" and r.keys == [b"key"]
    lowering.choose([r], 0, 1.5)
    assert r.sequence.quality == "fast" and r.keys == [] and not r.restored
    lowering.choose([], 0, 1.6)
    lowering.choose([r], 0, 1.6)
    assert r.sequence.quality == "fast"


@pytest.mark.parametrize("fields", [{}, {"quality": "balanced"}, {"min_quality": "exact"}])
def test_requests_without_a_lower_limit_keep_their_quality(fields):
    lowering, r = Lowering(1.0), waiting(0.0, **fields)
    lowering.choose([r], 5, 100.0)
    assert lowering.active and r.sequence.quality == fields.get("quality", "exact")


def test_a_request_that_has_started_keeps_its_quality():
    lowering, started, preempted = Lowering(1.0), *(waiting(0.0, min_quality="fast") for _ in range(2))
    started.started, preempted.preempted = 0.1, 1
    lowering.choose([started, preempted, waiting(0.0)], 0, 100.0)
    assert lowering.active and started.sequence.quality == preempted.sequence.quality == "exact"


def core_with_qualities(now, **options):
    core = make_core(batch_size_range=(2, 2), **options)

    def clock():
        now[0] += 0.001
        return now[0]

    core.clock = clock
    core.facts = replace(core.facts, qualities=True)
    core.lowering = Lowering(1.0)
    return core


def test_an_engine_lowers_under_load_says_so_and_comes_back():
    now = [0.0]
    core = core_with_qualities(now)
    sampling = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    found: dict[str, list] = {}

    def steps(count):
        for _ in range(count):
            now[0] += 0.2
            for output in core.step():
                found.setdefault(output.request_id, []).append(output.quality)

    for n in range(12):  # two at a time, of 8 steps each
        core.add(Request([n + 1, 5], sampling, id=f"{n}", min_quality="fast" if n % 2 else None))
    while not core.idle:
        steps(1)
    assert all(len(set(qualities)) == 1 for qualities in found.values()), "one quality for a whole answer"
    quality = {int(name): qualities[0] for name, qualities in found.items()}
    assert quality[0] == quality[1] == "exact", "they started at once"
    assert {quality[n] for n in range(0, 12, 2)} == {"exact"} and {quality[n] for n in range(3, 12, 2)} == {"fast"}
    assert core.metrics.qualities == {"exact": 7, "fast": 5} and core.metrics.lowered == 5
    core.add(Request([3, 4], replace(sampling, max_tokens=40), id="long"))
    steps(30)
    core.add(Request([7, 5], sampling, id="later", min_quality="fast"))
    steps(1)
    assert found["later"] == ["exact"] and not core.lowering.active


@pytest.mark.parametrize("priority", [MAX_PRIORITY, 0])
def test_preemptions_of_the_lowest_priority_lower_nothing(priority):
    """The cache has three blocks: an urgent request takes those of a batch's request, which is no reason to lower it."""
    now = [0.0]
    core = core_with_qualities(now, blocks=3)
    sampling = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True)
    core.add(Request([3, 5], sampling, id="urgent", priority=-1))
    core.add(Request([4, 5], sampling, id="other", priority=priority))
    while not core.scheduler.preemptions:
        core.step()
    core.add(Request([7, 5], sampling, id="later", priority=-1, min_quality="fast"))
    core.step()
    assert core.lowering.active is (priority == 0)
    assert [r.sequence.quality for r in (*core.scheduler.waiting, *core.scheduler.running) if r.request.min_quality] == [
        "exact" if priority else "fast"
    ]


def test_a_request_that_never_started_reports_no_quality():
    now = [0.0]
    core = core_with_qualities(now)
    core.add(Request([1, 2], id="a", quality="fast"))
    core.cancel("a")
    (output,) = core.step()
    assert output.finish == "cancelled" and output.quality is None and not core.metrics.qualities


def test_requests_for_a_model_with_one_precision_are_refused():
    core = make_core()
    for fields, name in (({"quality": "exact"}, "quality"), ({"min_quality": "fast"}, "min_quality")):
        with pytest.raises(RequestError, match="one quality.*int8_nested") as refused:
            core.add(Request([1, 2], id="a", **fields))
        assert refused.value.field == name
    core.add(Request([1, 2], id="a"))
    assert core.step()[0].quality is None and core.lowering is None


def test_wrong_values_are_refused():
    with pytest.raises(RequestError, match="must be one of fast, balanced, exact"):
        Request([1], quality="best")
    with pytest.raises(RequestError, match="above the quality"):
        Request([1], quality="fast", min_quality="balanced")
    assert Request([1]).floor == "exact" and Request([1], quality="fast").floor == "fast"
