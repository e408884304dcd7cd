"""The predicted speed on other machines: limits that are known exactly, and directions that must hold."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from deepseek_optimizer import DeepSeekConfig, DynamicGraphOptimizer
from deepseek_optimizer.backends import cpu
from deepseek_optimizer.bench import scaling_costs
from deepseek_optimizer.bench.memory_traffic import traffic_of
from deepseek_optimizer.bench.scaling import (
    Costs,
    Machine,
    cache_rate,
    hand_over,
    predict,
    predict_prefill,
    product_rate,
)
from deepseek_optimizer.bench.scaling_costs import Shape, fit, measure_costs
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


def test_rows_and_the_cache():
    """Short rows are slower by what each row takes; the cache has a rate of its own; both are divided among cores."""
    costs = replace(COSTS, row_s={1: 1e-8, 2: 6e-9}, cache_gb_s={1: 5.0, 2: 8.0})
    rows = StepWork((Stage(10e6, 0.0, 1 << 20, 1e6),), 0, 4e6, 1)
    for n in (1, 2):
        expected = 1e-4 + COSTS.hand_over_s[n] + 10e6 / (1e9 * COSTS.product_gb_s[n]) + 1e6 * costs.row_s[n]
        expected += 4e6 / (1e9 * costs.cache_gb_s[n])
        assert 1 / predict(rows, costs, Machine(n, 40.0)).middle == pytest.approx(expected)
    assert cache_rate(costs, Machine(8, 1e6)) == pytest.approx(40, rel=1e-3)
    free = replace(costs, hand_over_s={1: 0.0, 2: 0.0}, token_s=0.0)
    alone = 10e6 / 160e9 + 1e6 * 1e-8 / 8 + 4e6 / 40e9
    assert 1 / predict(rows, free, Machine(8, 1e6)).middle == pytest.approx(alone, rel=1e-2)


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


def test_the_fit_finds_the_costs():
    """Times that were computed from costs give these costs; what would be below zero is none."""
    works = [
        StepWork((Stage(size, 0.0, 64, rows),) * stages, stages, cache, 1)
        for size, rows, stages, cache in ((1e4, 99, 16, 0), (1e4, 99, 144, 1e3), (5e7, 8e3, 12, 1e4), (4e5, 2e3, 160, 9e4),
                                          (2e5, 3e3, 64, 3e7))
    ]  # fmt: skip
    known = (2e-4, 3e-6, 1 / 20e9, 4e-9, 1 / 9e9)

    def seconds(costs: tuple[float, ...]) -> list[float]:
        parts = [(1.0, w.hand_overs, w.weight_bytes, w.rows, w.cache_bytes) for w in works]
        return [sum(a * b for a, b in zip(costs, part, strict=True)) for part in parts]

    found = fit(works, seconds(known))
    assert (found.token_s, found.hand_over_s, found.byte_s, found.row_s, found.cache_byte_s) == pytest.approx(known, rel=1e-6)
    found = fit(works, seconds((2e-4, 3e-6, 1 / 20e9, -1e-9, 1 / 9e9)))
    assert found.row_s == 0.0 and found.byte_s > 0


@pytest.mark.skipif(cpu.unavailable_reason() is not None, reason="needs the native backend")
@pytest.mark.parametrize("precision", ["int4", "q4_k"])
def test_measuring(monkeypatch, precision):
    """Small sizes; no speed is asserted."""
    sizes = {name: Shape(256, 256, i + 1, 2, 1, 8) for i, name in enumerate(scaling_costs.SHAPES)}
    for name, value in (("SHAPES", sizes), ("_SQUARE", 256), ("_REPEATS", 1), ("_NEW", 4), ("_BANDWIDTH_BYTES", 1 << 20)):
        monkeypatch.setattr(scaling_costs, name, value)
    costs = measure_costs([1], precision, 0.01)
    assert costs.product_gb_s[1] > 0 and costs.product_tera > 0 and costs.hand_over_s[1] > 0 and costs.cache_gb_s[1] > 0
    assert costs.row_s[1] >= 0 and costs.token_s >= 0 and costs.read_gb_s > 0
