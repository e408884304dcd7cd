"""The cost of tokens, computed by hand."""

from __future__ import annotations

import pytest

from deepseek_optimizer import load_model
from deepseek_optimizer.bench.cost import (
    Hosted,
    Speed,
    blended,
    cost_report,
    machine_cost,
    needed_bytes,
    predicted_speeds,
    sections,
    too_small,
)
from deepseek_optimizer.bench.instances import DATE, INSTANCES
from deepseek_optimizer.bench.memory_traffic import Traffic
from deepseek_optimizer.bench.scaling import Costs
from deepseek_optimizer.bench.step_work import Stage, StepWork, step_work
from deepseek_optimizer.bench.work import Work
from deepseek_optimizer.errors import ConfigError

WORK = Work(prompt=300, new=100, batch=4)


def test_by_hand():
    """3.6 an hour is 0.001 a second: a thousand tokens a second cost 1 a million, a hundred cost 10."""
    cost = machine_cost(3.6, Speed(1000, 100), WORK)
    assert cost == {"in": pytest.approx(1), "out": pytest.approx(10), "blended": pytest.approx((300 * 1 + 100 * 10) / 400)}
    seconds = 300 / 1000 + 100 / 100  # of a request
    assert cost["blended"] == pytest.approx(0.001 * seconds / 400 * 1e6)
    assert blended(Hosted(1, 10), WORK) == pytest.approx(cost["blended"])


def test_report():
    fast, slow = Speed(10_000, 2000), Speed(10_000, 100)
    report = cost_report(
        WORK, slow, 0.36, {"c7a.8xlarge": (slow, fast)}, {"c7a.8xlarge": 0.36}, {"them": Hosted(0.1, 0.2)}, wish=0.05
    )
    here, there = report["machines"]
    assert here["blended"][0] == here["blended"][1] == pytest.approx((300 * 0.01 + 100 * 1) / 400)
    assert there["per_hour"] == 0.36 and there["out"] == [pytest.approx(0.05), pytest.approx(1.0)]
    assert there["times_wish"] == [pytest.approx(0.02 / 0.05), pytest.approx(here["blended"][0] / 0.05)]
    assert report["hosted"] == [{"name": "them", "in": 0.1, "out": 0.2, "blended": pytest.approx(0.125)}]
    speeds, table, answer = sections(report)
    assert [row[1] for row in speeds.rows] == ["measured", "predicted"] and "have not been checked" in speeds.note
    assert len(table.rows) == 3 and "example" not in table.note
    assert table.rows[1][1] == "0.360"
    assert [row[1] for row in answer.rows] == ["missed", "reached by the higher speed only", "missed"]
    assert answer.rows[2] == ("them", "missed", "2.50 times")


def test_the_price_per_hour_at_which_this_machine_costs_what_is_wished():
    speed = Speed(1000, 100)
    report = cost_report(WORK, speed, None, {}, {}, {}, wish=0.05)
    price = report["this_machine"]["affordable_per_hour"]
    assert machine_cost(price, speed, WORK)["blended"] == pytest.approx(0.05)
    speeds, _, answer = sections(report)
    assert f"up to {price:.3f} per hour" in answer.note
    assert speeds.rows == (("this machine", "measured", "1,000", "100.0"),) and not speeds.note


def test_unknown_instance():
    with pytest.raises(ConfigError, match=r"no instance 'c9\.huge'; known: c7i"):
        cost_report(WORK, None, None, {}, {"c9.huge": 1.0}, {})


def test_predictions_of_all_instances():
    """A machine with twice the cores and bandwidth of another one is not slower at prompts, and costs are positive."""
    step = StepWork(tuple(Stage(1e6, 8e6, 500) for _ in range(50)), 10, 1e6, 4)
    costs = Costs({1: 20.0, 2: 35.0}, 0.5, {1: 1e-6, 2: 1.2e-6}, 1e-4, 40.0)
    traffic = Traffic(50_000_000, 1000.0, weights=100_000_000, head_weights=1_000_000, attention_width=1000)
    speeds = {name: predicted_speeds(step, traffic, costs, WORK, name) for name in INSTANCES}
    assert all(0 < low.answer <= high.answer and low.prompt > 0 for low, high in speeds.values())
    assert speeds["c7a.48xlarge"][0].prompt > 5 * speeds["c7a.8xlarge"][0].prompt


def test_prices_that_were_not_given_are_marked():
    speed = Speed(1000, 100)
    report = cost_report(WORK, None, None, {"c7a.8xlarge": (speed, speed)}, {}, {}, left_out=["c8g.8xlarge"])
    _, table, _ = sections(report)
    assert table.rows[0][1].endswith("*") and report["machines"][0]["example_price"]
    assert "* An example price" in table.note and DATE in table.note and "--price NAME=PRICE" in table.note
    assert "too small for the model: c8g.8xlarge" in table.note and report["too_small"] == ["c8g.8xlarge"]


def test_memory():
    """40 GB of weights, and 4 requests of 400 tokens: 100 bytes of each token, and 20 of the last 64, and a state of 1000."""
    traffic = Traffic(1, 90.0, chosen_bytes=10.0, windows=((20.0, 64),), state_bytes=1000,
                      weights=1, head_weights=1, attention_width=1)  # fmt: skip
    assert needed_bytes(40 * 10**9, traffic, WORK) == 40 * 10**9 + 4 * (400 * 100 + 20 * 64 + 1000)
    assert too_small(list(INSTANCES), 60 * 2**30) == []
    assert too_small(list(INSTANCES), 70 * 2**30) == ["c7i.8xlarge", "c7a.8xlarge", "c8g.8xlarge"]


def test_models_without_a_plan_are_an_error(tiny_model):
    model = load_model(tiny_model, backend="reference")
    with pytest.raises(ConfigError, match="need a model with an execution plan on the cpu backend"):
        step_work(model, WORK)
