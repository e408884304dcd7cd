"""The cost model on an imagined machine whose costs are known: it finds them, and with them the search the best settings."""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass, replace

import numpy as np
import pytest

from deepseek_optimizer.bench.least_squares import nonnegative_least_squares
from deepseek_optimizer.engine.options import EngineOptions
from deepseek_optimizer.tune.cost_model import FEATURES, CostModel, StepCosts, _acceptance, features, fit_costs
from deepseek_optimizer.tune.search import CALIBRATED, FINALISTS, PAIRS, QUALIFYING, search
from deepseek_optimizer.tune.settings import Settings, space, value
from deepseek_optimizer.tune.simulation import Texts, simulate
from deepseek_optimizer.tune.steps import Observation, Record, StepLoad, TimedStep
from deepseek_optimizer.tune.traces import TraceRequest, prompts

STALL = 2.5
KNOWN = StepCosts((0.008, 0.0004, 0.0009, 0.0001, 0.003, 0.0002, 2e-7, 3e-8))
CPUS = 4
DEFAULTS = Settings(threads=CPUS)
VALUES = {
    "threads": space(CPUS, CPUS, ("auto",))["threads"], "prefill_chunk": (64, 256, 512), "batch": (1, 2, 4, 8, 32),
    "kv_cache": ("auto", "int8"), "drafts": (0, 8),
}  # fmt: skip
EVERY = [Settings(**dict(zip(VALUES, chosen, strict=True))) for chosen in itertools.product(*VALUES.values())]
TRACE = tuple(TraceRequest(0.1 * n, 100 + 60 * (n % 3), 8 + n % 7, f"user {n % 4}", 64) for n in range(10))
PROMPTS = prompts(TRACE, list, list(range(3000)), 3000)
ANSWERS = [[(7 * n + k // 4) % 50 for k in range(request.new_tokens)] for n, request in enumerate(TRACE)]


@dataclass(frozen=True)
class Speed:
    """A machine: with more than two threads it gets slower, and an int8 cache halves what attention takes."""

    threads: int
    kv_cache: str
    blocks: int
    noise: random.Random | None = None

    @property
    def token_bytes(self) -> float:
        return {"auto": 2000.0, "int8": 1000.0}[self.kv_cache]

    def seconds(self, load: StepLoad) -> float:
        slower = {1: 1.7, 2: 1.0, 3: 1.1, 4: 1.3}[self.threads]
        counts = features(load)
        if self.kv_cache == "int8":
            counts[6:] = [0.5 * count for count in counts[6:]]
        exact = slower * sum(cost * count for cost, count in zip(KNOWN.values, counts, strict=True))
        return exact if self.noise is None else exact * self.noise.uniform(0.95, 1.05)


class Imagined:
    """Replays on that machine. `calls`: settings that were replayed."""

    def __init__(self, model: CostModel | None = None, noise: float = 0.0, at_once: bool = False) -> None:
        self.model, self.calls = model, []
        self.trace = tuple(replace(request, at=0.0) for request in TRACE) if at_once else TRACE
        self.rng = random.Random(1) if noise else None

    def __call__(self, settings):
        while True:
            self.calls.append(settings)
            record, blocks = Record(), 64 * settings.batch
            machine = Speed(settings.threads, settings.kv_cache, blocks, self.rng)
            texts = Texts(PROMPTS, ANSWERS, 4096, None, settings.drafts)
            options = EngineOptions(stall=STALL, **settings.to_options())
            figures = simulate(self.trace, options, machine, texts=texts, record=record)
            assert record.answers == ANSWERS
            kl = {"auto": 0.0, "int8": 0.002}[settings.kv_cache]
            figures = replace(figures, memory_bytes=figures.memory_bytes + 1e6, kl=kl)
            if self.model is not None:
                self.model.add(Observation(settings, figures, record, self.trace, PROMPTS, 4096, None, blocks, 1e6))
            yield figures

    def once(self, settings):
        return next(iter(self(settings)))


@pytest.mark.parametrize("seed", range(5))
def test_least_squares_are_the_best_without_negative_ones(seed):
    """The conditions of Karush, Kuhn and Tucker: no gradient where x is above zero, and none that would lower it at zero."""
    rng = np.random.default_rng(seed)
    parts, values = rng.normal(size=(40, 8)) * 10.0 ** rng.integers(-4, 4, 8), rng.normal(size=40)
    found = nonnegative_least_squares(parts, values)
    gradient = (parts.T @ (values - parts @ found)) / np.linalg.norm(parts, axis=0)
    assert (found >= 0).all() and (found > 0).any() and (found == 0).any()
    assert np.abs(gradient[found > 0]).max() < 1e-9 and gradient[found == 0].max() < 1e-9


def loads(count, seed=0):
    rng = random.Random(seed)
    some = [
        StepLoad(rng.randint(0, 12), rng.randint(0, 3), rng.choice((0, 0, 64, 300)), rng.randint(0, 9000), 0)
        for _ in range(count)
    ]
    return [replace(one, prompt_attended=one.prompt * rng.randint(50, 800)) for one in some]


def test_the_fit_finds_the_costs():
    steps = [TimedStep(load, KNOWN.seconds(load)) for load in loads(200)]
    found = fit_costs(steps)
    assert len(found.values) == len(FEATURES) and found.values == pytest.approx(KNOWN.values, rel=1e-6)


def test_slow_steps_are_outliers():
    """Three in a hundred take ten times as long: without limit, they would add 27% to what steps take."""
    steps = [TimedStep(load, KNOWN.seconds(load) * (10 if n % 33 == 0 else 1)) for n, load in enumerate(loads(300))]
    found = fit_costs(steps)
    others = [step for n, step in enumerate(steps) if n % 33]
    assert sum(found.seconds(step.load) for step in others) == pytest.approx(sum(step.seconds for step in others), rel=0.1)


def test_what_few_steps_do_not_show_is_taken_from_the_prior():
    """Twice as fast with single rows: nothing else is known of prompts, and rows are not mistaken for them."""
    steps = [TimedStep(StepLoad(1, 0, 0, n), 0.5 * KNOWN.seconds(StepLoad(1, 0, 0, n))) for n in range(100)]
    found = fit_costs(steps, KNOWN)
    assert found.seconds(StepLoad(1, 0, 0, 50)) == pytest.approx(0.5 * KNOWN.seconds(StepLoad(1, 0, 0, 50)), rel=0.02)
    assert found.values[5] == pytest.approx(0.5 * KNOWN.values[5]) and found.values[4] == pytest.approx(0.5 * KNOWN.values[4])
    assert fit_costs([], KNOWN) == KNOWN


def test_acceptance():
    """Rounds of four drafts, each accepted with 0.5 after the one before it: 0.9375 of them."""
    assert _acceptance([(100, 400, 94), (100, 400, 93)]) == pytest.approx(0.5, abs=0.01)
    assert _acceptance([]) == _acceptance([(10, 30, 0)]) == 0 and _acceptance([(10, 30, 30)]) == pytest.approx(1, abs=1e-6)


def test_predictions_are_what_is_measured():
    """Of settings that were never replayed, and of a pair of threads and format that were not replayed together."""
    model = CostModel(DEFAULTS, STALL)
    measure = Imagined(model)
    for settings in (DEFAULTS, replace(DEFAULTS, threads=1), replace(DEFAULTS, kv_cache="int8")):
        measure.once(settings)
    model.fit()
    assert model.step_error < 0.02 and model.steps > 100
    for settings in (
        replace(DEFAULTS, batch=2, prefill_chunk=64), replace(DEFAULTS, threads=1, drafts=0), Settings(1, 128, 4, "int8", 2),
    ):  # fmt: skip
        said, was = model.predict(settings), Imagined().once(settings)
        assert said.latency_s == pytest.approx(was.latency_s, rel=0.1) and said.tok_s == pytest.approx(was.tok_s, rel=0.1)
        assert said.memory_bytes == pytest.approx(was.memory_bytes, rel=0.02) and said.kl == was.kl


@pytest.mark.parametrize("goal", ["latency", "throughput"])
def test_the_search_finds_the_optimum_with_few_replays(goal):
    """Of 240 settings. TPE over replays alone took 38 to 51 of them and found the best settings in 2 of 10 searches; with the
    model, 15 to 20 and 9 of 10."""
    pytest.importorskip("optuna")
    at_once, model = goal == "throughput", CostModel(DEFAULTS, STALL)
    cost = {settings: value(goal, Imagined(at_once=at_once).once(settings), None) for settings in EVERY}
    measure = Imagined(model, noise=0.05, at_once=at_once)
    found = search(measure, model, VALUES, DEFAULTS, goal, trials=12, kl_budget=0.01, seed=1)
    assert cost[found.best] <= 1.03 * min(cost.values()) < 0.9 * cost[DEFAULTS]
    tried = {one.settings for one in found.trials}
    assert len(tried) == len(found.trials) <= 12 and found.trials[0].settings == DEFAULTS
    confirming = 2 * (FINALISTS * QUALIFYING + PAIRS)
    assert len(measure.calls) - confirming <= 24
    assert found.predictions.error is not None and found.predictions.error < 0.1 and found.predictions.step_error < 0.1
    assert found.predictions.simulated > 50 and model.steps == found.predictions.steps
    for name in CALIBRATED[:2]:  # each value was measured before anything was predicted of it
        assert {getattr(one, name) for one in tried} == set(VALUES[name])
