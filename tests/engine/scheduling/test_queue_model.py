"""The model of the engine's queue: times by hand, and what the engine's own scheduler does."""

from __future__ import annotations

import pytest

from deepseek_optimizer.engine.options import EngineOptions
from deepseek_optimizer.engine.scheduling import queue_model
from deepseek_optimizer.engine.scheduling.batch_size import BatchSize
from deepseek_optimizer.engine.scheduling.budget import PromptBudget
from deepseek_optimizer.engine.scheduling.learned_policy import arms_around
from deepseek_optimizer.engine.scheduling.policy import FixedPolicy, Served, StepLimits, limits_of
from deepseek_optimizer.engine.scheduling.queue_model import QueueModel
from deepseek_optimizer.engine.scheduling.step_times import StepTimes
from deepseek_optimizer.tune.simulated_traces import bursty
from deepseek_optimizer.tune.simulation import Machine, simulate

STEP, ROW, PROMPT = 0.02, 0.0005, 0.002
OWN = StepLimits(32, 512, 2.5)


def times() -> StepTimes:
    found = StepTimes()
    for rows in (1, 2, 32):
        found.add(STEP + ROW * rows, rows, 0)
    found.add(STEP + ROW + PROMPT * 100, 1, 100)
    return found


def model(limits: StepLimits = OWN) -> QueueModel:
    known = times()
    made = QueueModel(BatchSize(1, 32, known), PromptBudget(512, 2.5, known), known)
    made.limit(limits)
    return made


def test_one_request_by_hand():
    """A prompt of 1,000 tokens takes two steps of at most 512, and three more tokens a step each."""
    made = model()
    made.add(1.0, Served(0, 1000, 3))
    assert made.run(100.0, 50) > 0
    assert made.waited == pytest.approx(2 * STEP + 1000 * PROMPT + 3 * (STEP + ROW)) == made.busy
    assert made.now == 100.0


def test_it_stops_when_it_is_told_and_goes_on():
    whole, parts = model(), model()
    for made in (whole, parts):
        for n in range(5):
            made.add(0.1 * n, Served(0, 100 + n, 30))
    whole.run(100.0, 1000)
    assert parts.run(100.0, 1) == 0 and parts.now < 100.0
    now = 0.0
    while parts.now < 100.0:
        now += 0.05
        parts.run(now, 1000)
        assert now <= parts.now < now + 1.5  # the last step may end later
    assert parts.waited == pytest.approx(whole.waited)


def test_a_batch_of_one_serves_one_after_the_other():
    made = model(StepLimits(1, 512, None))
    for _ in range(3):
        made.add(0.0, Served(0, 100, 9))
    made.run(100.0, 1000)
    each = STEP + 100 * PROMPT + 9 * (STEP + ROW)
    assert made.busy == pytest.approx(3 * each) and made.waited == pytest.approx((1 + 2 + 3) * each)


def test_a_prompt_waits_for_blocks_that_another_one_is_computing():
    def waited(prefix):
        made = model(StepLimits(32, 512, None))
        made.add(0.0, Served(0, 2048, 0, keys=[b"a", b"b"]))
        made.add(0.1, Served(0, 8, 0, prefix=prefix))
        made.run(100.0, 1000)
        return made.waited

    first = 4 * (STEP + 512 * PROMPT)
    assert waited(b"b") == pytest.approx(first + first + STEP + 8 * PROMPT - 0.1)
    assert waited(b"c") < waited(b"b") - 1.0


def test_limits_change_from_now_on():
    made = model()
    made.limit(StepLimits(1, 512, None))
    made.add(0.0, Served(0, 10, 5))
    made.add(0.0, Served(0, 10, 5))
    made.run(STEP + 10 * PROMPT, 1)
    made.limit(OWN)
    made.run(100.0, 1000)
    assert made.busy < 2 * (STEP + 10 * PROMPT + 5 * (STEP + ROW))


def test_it_holds_a_bounded_number_of_requests(monkeypatch):
    monkeypatch.setattr(queue_model, "_MOST", 10)
    made = model()
    for _ in range(50):
        made.add(0.0, Served(0, 1, 0))
    made.run(1e6, 1000)
    assert made.waited == pytest.approx(10 * (STEP + 10 * PROMPT))


@pytest.mark.parametrize("limits", arms_around(OWN), ids=str)
def test_it_predicts_what_the_engine_does(limits):
    trace = bursty(bursts=8)
    found = simulate(trace, EngineOptions(stall=2.5), Machine(STEP, ROW, PROMPT, context=0.0), FixedPolicy(limits))
    made = model(limits)
    for request in trace:
        made.add(request.at, Served(0, request.prompt_tokens, request.new_tokens - 1))
    assert made.run(1e6, 100_000) > 0
    assert limits_of(EngineOptions(stall=2.5)) == OWN
    assert made.waited / len(trace) == pytest.approx(found.latency_s, rel=0.02)
