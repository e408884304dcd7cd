"""The predicted speed on other machines: limits that are known exactly, and directions that must hold."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from deepseek_optimizer import DeepSeekConfig, DynamicGraphOptimizer
from deepseek_optimizer.backends import cpu
from deepseek_optimizer.bench.memory_traffic import traffic_of
from deepseek_optimizer.bench.scaling import Costs, Machine, hand_over, predict, predict_prefill, product_rate
from deepseek_optimizer.bench.scaling_costs import hand_over_s, product_gb_s, product_tera
from deepseek_optimizer.bench.step_work import Stage, StepWork, step_work
from deepseek_optimizer.bench.work import Work
from support.models import CASES, random_model

COSTS = Costs({1: 20.0, 2: 30.0}, 0.5, {1: 1e-6, 2: 2e-6}, 1e-4, 40.0, "test")
WORK = StepWork(tuple(Stage(10e6, 20e6, 1000) for _ in range(100)), 20, 0.0, 1)


def test_this_machine_by_hand():
    """With the measured numbers of threads, nothing is extrapolated."""
    for n in (1, 2):
        found = predict(WORK, COSTS, Machine(n, 40.0))
        assert 1 / found.middle == pytest.approx(1e-4 + 120 * COSTS.hand_over_s[n] + 1e9 / (1e9 * COSTS.product_gb_s[n]))
        assert found.low == found.high and sum(found.shares.values()) == pytest.approx(1)


def test_limits():
    """Fast memory: cores are the limit; slow memory: it is; with many sequences, arithmetic."""
    assert product_rate(COSTS, Machine(8, 1e6)) == pytest.approx(160, rel=1e-3)
    assert product_rate(COSTS, Machine(1000, 100)) == pytest.approx(90, rel=1e-3)
    assert product_rate(COSTS, Machine(8, 1e6, speed=0.5)) == pytest.approx(80, rel=1e-3)
    busy = StepWork((Stage(1e6, 1e12, 1 << 20),), 0, 0.0, 64)
    assert predict(busy, COSTS, Machine(1, 40.0)).shares["weights"] > 0.99
    assert predict(busy, COSTS, Machine(8, 400.0)).low == pytest.approx(64 / (1 / 4), rel=0.01)


def test_directions():
    """Never faster with fewer cores (while hand-overs cost nothing) or slower memory; hand-overs only cost."""
    free = Costs(COSTS.product_gb_s, COSTS.product_tera, {1: 0.0, 2: 0.0}, 0.0, 40.0)
    speeds = [predict(WORK, free, Machine(n, 200.0)).middle for n in (4, 8, 16, 64, 192)]
    assert speeds == sorted(speeds) and speeds[1] > 1.6 * speeds[0]
    speeds = [predict(WORK, COSTS, Machine(64, gb_s)).middle for gb_s in (40, 100, 400, 800)]
    assert speeds == sorted(speeds)
    for machine in (Machine(8, 40), Machine(64, 300), Machine(64, 400, 2), Machine(192, 800, 4)):
        found = predict(WORK, COSTS, machine)
        assert 0 < found.low <= found.middle <= found.high <= predict(WORK, free, machine).middle


def test_few_tasks_leave_cores_idle():
    """A matrix of 4 tile rows is no faster with 64 cores than with 4 if cores are the limit."""
    few = StepWork((Stage(1e9, 0.0, 4),), 0, 0.0, 1)
    free = Costs({1: 20.0}, 1.0, {1: 0.0}, 0.0, 20.0)
    assert predict(few, free, Machine(64, 1e6)).middle == pytest.approx(predict(few, free, Machine(4, 1e6)).middle, rel=0.2)


def test_memory_nodes():
    """Two nodes are at most twice as fast as one of half the size; hand-overs between them are dearer."""
    one, two = predict(WORK, COSTS, Machine(32, 200)), predict(WORK, COSTS, Machine(64, 400, nodes=2))
    assert one.low < two.high < 2 * one.high
    assert hand_over(COSTS, Machine(64, 400, nodes=2))[1] > hand_over(COSTS, Machine(64, 400))[1]


def test_prompts():
    assert predict_prefill(4e12, COSTS, Machine(8, 40)) == pytest.approx(1.0)
    assert predict_prefill(4e12, COSTS, Machine(8, 40), stages=100) > 1.0


def test_costs_survive_json():
    assert Costs.from_dict(json.loads(json.dumps(COSTS.to_dict()))) == COSTS
    with pytest.raises(KeyError):
        Costs.from_dict({})


def test_the_table_names_its_sources(monkeypatch):
    root = Path(__file__).resolve().parents[2]
    if not (root / "benchmarks" / "scaling.py").exists():
        pytest.skip("the benchmarks are not part of the package")
    monkeypatch.setattr(sys, "path", [str(root), *sys.path])
    from benchmarks.scaling import MACHINES, table

    text = "\n".join(table("model", WORK, COSTS))
    assert text.count("\n| ") >= len(MACHINES) + 4 and "vLLM, pull request 32792" in text


@pytest.mark.skipif(cpu.unavailable_reason() is not None, reason="needs the native backend")
@pytest.mark.parametrize("case", ["llama-gqa", "mixtral-window"])
def test_work_of_a_plan(case):
    """The bytes are those that the memory traffic has, whatever the stages are."""
    model = DynamicGraphOptimizer(random_model(CASES[case]()), config=DeepSeekConfig(precision="int8", threads=1)).optimize()
    for batch in (1, 3):
        work = Work(prompt=20, new=4, batch=batch)
        found, traffic = step_work(model, work), traffic_of(model)
        assert found.weight_bytes == pytest.approx(traffic.weight_bytes + sum(e.read(batch) for e in traffic.experts))
        assert found.weight_bytes + found.cache_bytes == pytest.approx(traffic.step_bytes(work))
        assert found.others == model.config.num_hidden_layers and all(stage.tasks >= 1 for stage in found.stages)


@pytest.mark.skipif(cpu.unavailable_reason() is not None, reason="needs the native backend")
def test_measuring(monkeypatch):
    """Small sizes; no speed is asserted."""
    for name, value in (
        ("_ROWS", 256),
        ("_COLS", 256),
        ("_MATRICES", 2),
        ("_SQUARE", 64),
        ("_LAYERS", (1, 2)),
        ("_REPEATS", 1),
    ):
        monkeypatch.setattr(f"deepseek_optimizer.bench.scaling_costs.{name}", value)
    assert product_gb_s("int4", 1, 0.01) > 0 and product_tera("int4", 0.01) > 0
    each, outside = hand_over_s(1, 10.0)
    assert each > 0 and outside >= 0
