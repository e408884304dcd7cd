"""The search, with a function in place of measurements."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from deepseek_optimizer.errors import ConfigError, RequestError
from deepseek_optimizer.tune import search as searches
from deepseek_optimizer.tune.page import page, pareto, sections, tune_report
from deepseek_optimizer.tune.search import MARGIN, PAIRS, QUALIFYING, ROUNDS, Trial, search
from deepseek_optimizer.tune.settings import GOALS, Figures, Settings, space, value

optuna = pytest.importorskip("optuna")

CPUS = 8
DEFAULTS = Settings(threads=CPUS)
VALUES = space(CPUS, CPUS, ("auto", "int8", "int4"))


class Pretended:
    """Replays of a machine whose best settings are known: 4 threads, small chunks, a batch of 8, no drafts. As a model, it
    predicts them without noise."""

    steps, step_error = 100, 0.01

    def __init__(self, noise=0.02, best=True):
        self.rng, self.noise, self.best, self.calls = random.Random(3), noise, best, {}
        self.opened = self.closed = self.fits = 0

    def fit(self):
        self.fits += 1

    def predict(self, settings):
        return next(iter(Pretended(0, self.best)(settings)))

    def __call__(self, settings):
        worse = 1.0
        if self.best:
            worse += abs(settings.threads - 4) / 4 + abs(settings.prefill_chunk - 128) / 512 + abs(settings.batch - 8) / 16
            worse += settings.drafts / 16
        elif settings != DEFAULTS:
            worse = 1.3
        size = {"auto": 2.0, "int8": 1.0, "int4": 0.5}[settings.kv_cache] * settings.batch
        self.opened += 1
        try:
            while True:
                self.calls[settings] = self.calls.get(settings, 0) + 1
                latency = worse * (1 + self.noise * self.rng.uniform(-1, 1))
                kl = {"auto": 0.0, "int8": 0.001, "int4": 0.2}[settings.kv_cache]
                yield Figures(latency, latency / 4, 1000 / latency, 1e6 * (100 + size), kl)
        finally:
            self.closed += 1


class Blind:
    """A model that predicts more latency for each call: nothing is the same, and what comes first is the best."""

    steps, step_error = 0, 0.0

    def __init__(self):
        self.known = {}

    def fit(self):
        pass

    def predict(self, settings):
        return self.known.setdefault(settings, Figures(1 + 1e-6 * len(self.known), 0.1, 100.0, 1e6))


def test_numbers_of_threads():
    assert space(2, 2, ("auto",))["threads"] == [1, 2]
    assert space(32, 64, ("auto",))["threads"] == [1, 8, 16, 24, 31, 32, 64]  # cores, and their hyper-threads
    assert space(8, 4, ("auto",))["threads"] == [1, 2, 4, 6, 7, 8]  # DSO_THREADS says so


@pytest.mark.parametrize("goal", ["latency", "throughput"])
def test_finds_better_settings(goal):
    pretended = Pretended()
    found = search(pretended, pretended, VALUES, DEFAULTS, goal, trials=20, seed=1)
    assert found.gain > 1.0 and found.best.kv_cache == "auto"  # no loss of quality is allowed
    assert abs(found.best.threads - 4) <= 2 and found.best.batch <= 16 and found.best.drafts <= 4
    assert found.trials[0].settings == DEFAULTS and found.trials[0].figures is not None
    assert found.predictions.error < 0.02 and found.predictions.simulated > 100 and found.predictions.steps == 100
    assert pretended.opened == pretended.closed


def test_the_defaults_stay_if_nothing_is_better():
    pretended = Pretended(best=False)
    found = search(pretended, pretended, VALUES, DEFAULTS, "latency", trials=25)
    assert found.best == found.defaults == DEFAULTS and found.gain == 0


def test_noise_alone_is_no_improvement():
    """All settings are equal, measured with 10% of noise: whatever was luckiest is measured again."""
    pretended = Pretended(noise=0.1)
    pretended.best = None
    found = search(lambda s: _noisy(pretended.rng), Blind(), VALUES, DEFAULTS, "latency", trials=14)
    assert found.gain == 0 or found.gain > MARGIN
    assert found.gain < 0.1


def _noisy(rng):
    while True:
        yield Figures(1 + rng.uniform(-0.1, 0.1), 0.1, 100.0, 1e6)


@pytest.mark.parametrize("slow", [None, 3])
def test_the_others_are_better_in_every_pair(slow):
    """By 20%, but if one of their last replays was slow, it may be luck. Neither side is always the first one."""
    best, order = Settings(threads=4), []

    def measure(settings):
        order.append(settings)
        mine = [n for n, one in enumerate(order) if one == settings]
        worse = settings == best and slow is not None and len(mine) == 1 + slow
        while True:
            yield Figures(1.0 if settings == best and not worse else 1.2, 0.1, 100.0, 1e6)

    found = search(measure, Blind(), {"threads": (4, CPUS)}, DEFAULTS, "latency", trials=10)
    assert found.best == (best if slow is None else DEFAULTS) and (found.gain > 0.19) == (slow is None)
    pairs = [order[-2 * PAIRS :][n : n + 2] for n in range(0, 2 * PAIRS, 2)]
    assert all(set(pair) == {best, DEFAULTS} for pair in pairs) and len({pair[0] for pair in pairs}) == 2


def test_what_was_lucky_in_the_search_gives_way_to_the_next():
    """The settings with the best measurements are worse than the defaults when they are measured again; the second are not."""
    lucky, good = Settings(threads=2), Settings(threads=4)
    opened = {lucky: 0, good: 0, DEFAULTS: 0}

    def measure(settings):
        opened[settings] += 1
        latency = {lucky: 0.5 if opened[lucky] == 1 else 1.3, good: 0.8, DEFAULTS: 1.0}[settings]
        while True:
            yield Figures(latency, 0.1, 100.0, 1e6)

    found = search(measure, Blind(), {"threads": (2, 4, CPUS)}, DEFAULTS, "latency", trials=12)
    assert found.best == good and abs(found.gain - 0.25) < 1e-9
    assert opened[lucky] == 1 + QUALIFYING and opened[good] == 1 + QUALIFYING + PAIRS


def test_the_number_of_settings():
    """The defaults are one of them, and are not replayed twice."""
    pretended = Pretended()
    found = search(pretended, pretended, VALUES, DEFAULTS, "latency", trials=2)
    assert len(found.trials) == 2 and found.trials[1].settings != DEFAULTS


def test_each_number_of_threads_and_format_is_measured_before_it_is_predicted():
    pretended, notes = Pretended(), []
    found = search(pretended, pretended, VALUES, DEFAULTS, "latency", trials=14, kl_budget=0.01, note=notes.append)
    changed = [(name, v) for name in ("threads", "kv_cache") for v in VALUES[name] if v != getattr(DEFAULTS, name)]
    first = found.trials[1 : 1 + len(changed)]
    assert [one.settings for one in first] == [replace(DEFAULTS, **{name: v}) for name, v in changed]
    assert all(one.predicted is None for one in first) and all(one.predicted for one in found.trials[1 + len(changed) :])
    assert any("kv_cache=int4 is not searched: KL divergence" in note for note in notes)
    assert all(one.settings.kv_cache != "int4" for one in found.trials[1 + len(changed) :])
    few = search(pretended, pretended, VALUES, DEFAULTS, "latency", trials=6, note=notes.append)
    assert len(few.trials) <= 6 and any("predicted from others" in note for note in notes)


def test_the_search_ends_when_nothing_is_predicted_to_be_better():
    pretended = Pretended(noise=0)
    found = search(pretended, pretended, VALUES, DEFAULTS, "latency", trials=1000, seed=3)
    assert len(found.trials) < 40 and pretended.fits > 1


def test_slow_simulations_are_fewer(monkeypatch):
    monkeypatch.setattr(searches, "SECONDS", 0.01)
    pretended = Pretended()
    found = search(pretended, pretended, VALUES, DEFAULTS, "latency", trials=12)
    assert 0 < found.predictions.simulated < searches.SIMULATED


def test_settings_that_come_to_the_same_are_measured_once():
    """Batches from 8 on are equal, to the machine and to the model."""
    calls = set()

    def measure(settings):
        calls.add(settings.batch)
        while True:
            yield Figures(1.0 + 1 / min(settings.batch, 8), 0.1, 100.0, 1e6)

    class Equal(Blind):
        def predict(self, settings):
            return next(measure(settings))

    values = {"batch": (1, 2, 4, 8, 16, 32, 64)}
    found = search(measure, Equal(), values, DEFAULTS, "latency", trials=20)
    assert found.best == DEFAULTS and [one.settings.batch for one in found.trials] == [32]


def test_quality_is_a_limit():
    pretended = Pretended()
    found = search(pretended, pretended, VALUES, DEFAULTS, "memory", trials=16, kl_budget=0.01, seed=2)
    assert found.best.kv_cache in ("auto", "int8")
    assert all(one.figures is None or one.figures.kl <= 0.01 for one in found.trials)
    assert any(one.error.startswith("KL divergence 0.2") for one in found.trials)


def test_settings_of_which_the_model_says_that_they_are_not_possible_are_not_measured():
    class Small(Pretended):
        def predict(self, settings):
            if settings.batch < 16:
                raise RequestError("prompt", "does not fit")
            return super().predict(settings)

    pretended = Small()
    found = search(pretended, pretended, VALUES, DEFAULTS, "latency", trials=12)
    assert found.best.batch == 16 and all(one.settings.batch >= 16 for one in found.trials)


@pytest.mark.parametrize("error", [ConfigError("too few"), RequestError("prompt", "too few"), MemoryError("too few")])
def test_settings_that_are_not_possible_are_passed_over(error):
    pretended = Pretended()

    def measure(settings):
        if settings.threads < 4:
            raise error
        return pretended(settings)

    def late(settings):
        yield from measure(settings)

    found = search(late, pretended, VALUES, DEFAULTS, "latency", trials=14)
    assert found.best.threads >= 4 and any("too few" in one.error for one in found.trials)


def test_clearly_worse_settings_are_ended_early():
    """The model is wrong about them."""
    pretended = Pretended()
    found = search(pretended, Blind(), VALUES, DEFAULTS, "latency", trials=20, seed=1)
    ended = [one.settings for one in found.trials if one.error == "ended early"]
    assert ended and all(pretended.calls[settings] < ROUNDS for settings in ended if settings != found.best)


def test_memory_counts_only_with_speed():
    plain = Figures(1, 1, 100, 100e6)
    assert value("memory", Figures(1, 1, 90, 90e6), plain) == 90e6
    assert value("memory", Figures(1, 1, 40, 90e6), plain) > 100e6
    assert [value(goal, plain, None) for goal in GOALS] == [1, 0.01, 100e6]


def test_pareto_and_page():
    def trial(drafts, speed, memory, kl=0.0):
        return Trial(Settings(1, drafts=drafts), Figures(1, 1, speed, memory, kl))

    trials = [trial(0, 100, 10), trial(1, 90, 10), trial(2, 90, 5), trial(3, 120, 20, 0.1), trial(4, 100, 10, 0.1)]
    trials[3] = replace(trials[3], predicted=Figures(1.5, 1, 60, 20))
    assert [one.settings.drafts for one in pareto(trials)] == [0, 2, 3]
    plain = trials[0].figures
    found = searches.Found(
        trials[3].settings, trials[0].settings, 0.2, trials[3].figures, plain, [*trials, Trial(Settings(2), None, "bad")],
        searches.Predictions(200, 3000, 0.07, [0.1, -0.2, 0.05]),
    )  # fmt: skip
    report = tune_report(found, "latency", "<chat>", {"requests": 1}, "a <model>", "p.json")
    text = page(report, found)
    assert text.startswith("<!doctype html>") and "&lt;model&gt;" in text and "<model>" not in text
    assert text.count("<circle") == 2 * 3 and text.count("<rect") == 2 * 2 and "<script" not in text and "src=" not in text
    first, front, everything, predicted = sections(found, "latency", "chat", "p.json")
    assert len(front.rows) == 3 and len(everything.rows) == 6 and "20% better" in first.note
    assert "200 simulated" in first.note and "3,000 steps" in first.note and "median 10%, at most 20%" in first.note
    assert report["prediction_error"] == 0.1 and "median 10%" in text
    assert predicted.rows == ((str(trials[3].settings), "1.500 s (+50%)", "1.000 s (+0%)", "60 (-50%)", "0.0 MB (+0%)"),)
