"""Simulated replays: times by hand, and what policies must do."""

from __future__ import annotations

import pytest

from deepseek_optimizer.engine.options import EngineOptions
from deepseek_optimizer.tune.simulated_traces import bursty
from deepseek_optimizer.tune.simulation import Machine, simulate
from deepseek_optimizer.tune.traces import TraceRequest, agents

MACHINE = Machine(step=0.01, row=0.001, prompt=0.0001, context=0.0, blocks=512)


def test_one_request_by_hand():
    """A prompt of 1,000 tokens takes two steps of at most 512, and three more tokens a step each."""
    found = simulate((TraceRequest(0.0, 1000, 4),), EngineOptions(), MACHINE)
    assert found.first_s == pytest.approx(2 * 0.01 + 1000 * 0.0001)
    assert found.latency_s == pytest.approx(found.first_s + 3 * (0.01 + 0.001))
    assert found.tok_s == pytest.approx(1004 / found.latency_s)
    assert found.memory_bytes > 0


def test_a_common_beginning_is_computed_once():
    trace = tuple(TraceRequest(float(n), 960, 2, "a", 960 - 32) for n in range(4))
    shared = simulate(trace, EngineOptions(), MACHINE)
    alone = simulate(trace, EngineOptions(prefix_cache=False), MACHINE)
    assert shared.first_s < 0.6 * alone.first_s


def test_batches_answer_a_burst_sooner_than_one_after_the_other():
    trace = bursty(bursts=1)
    one = simulate(trace, EngineOptions(batch_size_range=(1, 1)), MACHINE)
    many = simulate(trace, EngineOptions(batch_size_range=(1, 32)), MACHINE)
    assert many.latency_s < 0.5 * one.latency_s and many.tok_s > 2 * one.tok_s


def test_the_same_twice():
    trace = agents()
    assert simulate(trace, EngineOptions(stall=2.5), MACHINE) == simulate(trace, EngineOptions(stall=2.5), MACHINE)
