"""The search: Optuna's TPE over simulated replays, and measured replays of what these predict to be best.

Hundreds of settings are replayed in virtual time by a cost model of the machine (`cost_model.py`). The best of them that differ
are measured, the model is fitted again to all steps so far, and so on, until nothing that was not measured is predicted to be
better, or enough was measured. Before, each number of threads and each format is replayed once with the other settings at their
defaults, so that the model knows its steps. Replays that are clearly worse than others are ended early.

The best of many noisy measurements is an overestimate. So the few best settings are measured again, in pairs with the defaults,
and then the best of these once more. The defaults stay unless it is better in every one of the last pairs, and by more than 3%
by their median. Of settings that are equal, one in 32 passes the first of these conditions.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Protocol

from ..errors import ConfigError, MissingPackageError, RequestError
from .settings import Figures, Settings, value

MARGIN = 0.03  # improvements up to this are noise
ROUNDS = 3  # replays of settings
FINALISTS, QUALIFYING = 4, 3  # settings that meet the defaults, if there are so many, and in how many pairs
PAIRS = 5  # of replays of the two sides in the end
SIMULATED = 150  # settings that are simulated each time the model has been fitted
SECONDS = 60.0  # for these: those of long traces take longer than of short ones
BATCH = 3  # settings that are measured before the model is fitted again
CALIBRATED = ("threads", "kv_cache", "precision", "quality")  # settings whose values change what steps cost
_STARTUP = 30  # random settings before TPE has something to go by
_COMPARED = 4  # trials before pruning has something to compare with
_SEEDS = 3  # of the best settings so far, that each simulated search begins with

Measure = Callable[[Settings], Iterator[Figures]]  # one replay after the other


class Model(Protocol):
    """Predicts replays, see `cost_model.CostModel`. It sees what is measured by itself.

    Attributes:
        steps, step_error: see there.
    """

    steps: int
    step_error: float

    def fit(self) -> None:
        """Takes into account what was measured since the last call."""

    def predict(self, settings: Settings) -> Figures:
        """What a replay would show."""


@dataclass(frozen=True)
class Trial:
    """Settings that were tried.

    Attributes:
        settings: the settings.
        figures: None: the replay was ended early, or failed (`error`).
        error: why there are no figures.
        predicted: what the model said before they were measured; None: it had nothing to go by.
    """

    settings: Settings
    figures: Figures | None
    error: str = ""
    predicted: Figures | None = None


@dataclass(frozen=True)
class Predictions:
    """How well the model predicted.

    Attributes:
        simulated: number of simulated replays.
        steps: number of measured steps that it was fitted to in the end.
        step_error: median of their relative errors.
        errors: relative errors at the goal of settings that were measured after they had been predicted: 0.1: 10% too much.
    """

    simulated: int = 0
    steps: int = 0
    step_error: float = 0.0
    errors: list[float] = field(default_factory=list)

    @property
    def error(self) -> float | None:
        """Median of the errors' absolute values; None: nothing was predicted."""
        return statistics.median(map(abs, self.errors)) if self.errors else None


@dataclass(frozen=True)
class Found:
    """The result.

    Attributes:
        best: the settings to use: the defaults, unless others are better.
        defaults: the default settings.
        gain: by how much the best settings are better at the goal: 0.2: the defaults take 1.2 times as much.
        best_figures, default_figures: measured in pairs, in the end.
        trials: all that were measured, in order.
        predictions: how well the model predicted them.
    """

    best: Settings
    defaults: Settings
    gain: float
    best_figures: Figures
    default_figures: Figures
    trials: list[Trial] = field(default_factory=list)
    predictions: Predictions = field(default_factory=Predictions)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def search(
    measure: Measure,
    model: Model,
    values: Mapping[str, Sequence[Any]],
    defaults: Settings,
    goal: str,
    *,
    trials: int,
    kl_budget: float | None = None,
    seed: int = 0,
    note: Callable[[str], None] = lambda _: None,
) -> Found:
    """Finds settings.

    Args:
        measure: replays with some settings; its iterator is closed early for bad ones. A ConfigError, a request that does not
            fit the cache, or a lack of memory rules settings out.
        model: predicts replays.
        values: of each setting, see `settings.space`.
        defaults: tried first.
        goal: of `GOALS`.
        trials: number of settings to measure at most, the defaults among them.
        kl_budget: largest KL divergence of settings that may be chosen; None: none is allowed.
        seed: of the search.
        note: called with progress.

    Raises:
        MissingPackageError: Optuna is not installed.
        ConfigError: what the defaults raise.
    """
    found = _Search(import_optuna(), measure, model, values, defaults, goal, trials, kl_budget or 0.0, seed, note)
    found.calibrate()
    while len(found.tried) < trials and (candidates := found.candidates()):
        for settings in candidates[: trials - len(found.tried)]:
            found.measured(settings, ROUNDS, model.predict(settings))
    model.fit()
    confirmed = _confirm(measure, found.ranked(), defaults, goal, found.tried)
    return replace(confirmed, predictions=Predictions(found.simulated, model.steps, model.step_error, found.errors()))


class _Search:
    """The state of a search: what was measured, and what is still to be tried."""

    def __init__(
        self,
        optuna: Any,
        measure: Measure,
        model: Model,
        values: Mapping[str, Sequence[Any]],
        defaults: Settings,
        goal: str,
        trials: int,
        kl_budget: float,
        seed: int,
        note: Callable[[str], None],
    ) -> None:
        self._optuna, self._measure, self._model, self._defaults = optuna, measure, model, defaults
        self._values, self._goal, self._trials, self._kl_budget = dict(values), goal, trials, kl_budget
        self._seed, self._note, self.simulated = seed, note, 0
        pruner = optuna.pruners.MedianPruner(n_startup_trials=_COMPARED)
        self._study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=seed), pruner=pruner)
        replays, first = list(_some(measure(defaults), ROUNDS)), self._study.ask()
        self.plain = _mean(replays)
        for step in range(len(replays)):
            first.report(self._value(_mean(replays[: step + 1])), step)
        self._study.tell(first, self._value(self.plain))
        self.tried = [Trial(defaults, self.plain)]
        note(f"defaults: {defaults}")

    def calibrate(self) -> None:
        """Replays each value of the settings that change what steps cost once, with half of the trials at most. Values with
        which that is not possible, or which cost too much quality, are not searched."""
        found = [
            replace(self._defaults, **{name: each})
            for name in CALIBRATED
            for each in self._values.get(name, ())
            if each != getattr(self._defaults, name)
        ]
        room = self._trials // 2
        if len(found) > room:
            left = f"{len(found) - room} of {len(found)} numbers of threads and formats"
            self._note(f"{left} are predicted from others; with more trials they are measured")
        for settings in found[:room]:
            self.measured(settings, 1, None)
            if (trial := self.tried[-1]).figures is None:
                name = next(name for name in CALIBRATED if getattr(settings, name) != getattr(self._defaults, name))
                self._values[name] = [each for each in self._values[name] if each != getattr(settings, name)]
                self._note(f"{name}={getattr(settings, name)} is not searched: {trial.error}")

    def measured(self, settings: Settings, rounds: int, predicted: Figures | None) -> None:
        """Measures settings, and adds them to those that were tried."""
        trial = self._study.ask()  # without parameters: by its replays, others are ended early
        figures, error = self._replayed(settings, rounds, trial)
        if figures is None:
            self._study.tell(trial, state=self._optuna.trial.TrialState.PRUNED)
        else:
            cost = self._value(figures)
            self._study.tell(trial, cost)
            ratio = cost / value(self._goal, self.plain, None)
            self._note(f"{len(self.tried) + 1} of {self._trials}: {settings}: {ratio:.2f} of the defaults")
        self.tried.append(Trial(settings, figures, error, predicted))

    def ranked(self) -> list[Settings]:
        """What was measured, the best first."""
        known = [(self._value(one.figures), number) for number, one in enumerate(self.tried) if one.figures is not None]
        return [self.tried[number].settings for _, number in sorted(known)]

    def candidates(self) -> list[Settings]:
        """The best settings by the model that were not measured and do not come to the same as others: none if they are not
        predicted to be better than what was, by more than the model has been wrong."""
        model = self._model
        model.fit()
        tried = {one.settings for one in self.tried}
        predicted = [model.predict(one.settings) for one in self.tried if one.figures is not None]
        plain = predicted[0]
        best = min(value(self._goal, figures, plain) for figures in predicted)
        wrong = max([MARGIN, *([statistics.median(map(abs, errors))] if (errors := self.errors()) else [])])
        found: list[Settings] = []
        same = set(predicted)
        for cost, settings in self._simulated(plain):
            figures = model.predict(settings)
            if cost > best * (1 + wrong) or len(found) == BATCH:
                break
            if settings not in tried and figures not in same:
                found.append(settings)
                same.add(figures)
        return found

    def _simulated(self, plain: Figures) -> list[tuple[float, Settings]]:
        """Searches simulated replays: predicted values of the goal and settings, the best first."""
        sampler = self._optuna.samplers.TPESampler(seed=self._seed + len(self.tried), n_startup_trials=_STARTUP)
        study = self._optuna.create_study(sampler=sampler)
        for known in self.ranked()[:_SEEDS]:
            study.enqueue_trial({name: getattr(known, name) for name, some in self._values.items() if len(some) > 1})
        seen: dict[Settings, float] = {}

        def objective(trial: Any) -> float:
            chosen = {name: _suggest(trial, name, some) for name, some in self._values.items()}
            settings = replace(self._defaults, **chosen)
            try:
                figures = self._model.predict(settings)
            except (ConfigError, RequestError, MemoryError):  # a request does not fit the cache
                raise self._optuna.TrialPruned from None
            if figures.kl > self._kl_budget:
                raise self._optuna.TrialPruned
            seen[settings] = value(self._goal, figures, plain)
            return seen[settings]

        study.optimize(objective, n_trials=SIMULATED, timeout=SECONDS)
        self.simulated += len(seen)
        return sorted(((cost, settings) for settings, cost in seen.items()), key=lambda pair: pair[0])

    def errors(self) -> list[float]:
        """See `Predictions`."""
        pairs = [(one.predicted, one.figures) for one in self.tried if one.predicted is not None and one.figures is not None]
        return [self._value(predicted) / self._value(figures) - 1 for predicted, figures in pairs]

    def _value(self, figures: Figures) -> float:
        return value(self._goal, figures, self.plain)

    def _replayed(self, settings: Settings, rounds: int, trial: Any) -> tuple[Figures | None, str]:
        """What replays show; or None, and why."""
        replays: list[Figures] = []
        iterator = self._measure(settings)
        try:
            for step, figures in enumerate(_some(iterator, rounds)):
                if figures.kl > self._kl_budget:
                    return None, f"KL divergence {figures.kl:.4f} nats"
                replays.append(figures)
                trial.report(self._value(_mean(replays)), step)
                if step + 1 < rounds and trial.should_prune():
                    return None, "ended early"
        except (ConfigError, RequestError, MemoryError) as error:
            return None, str(error)
        finally:
            iterator.close()  # type: ignore[attr-defined]
        return _mean(replays), ""


def _confirm(measure: Measure, ranked: list[Settings], defaults: Settings, goal: str, tried: list[Trial]) -> Found:
    """Measures the best settings and the defaults again, in pairs. ranked: what was measured, the best first."""
    if ranked[0] == defaults:
        figures = tried[0].figures
        assert figures is not None
        return Found(defaults, defaults, 0.0, figures, figures, tried)
    best, *others = [settings for settings in ranked if settings != defaults][:FINALISTS]
    if others:
        gains = {one: _pairs(measure, one, defaults, goal, QUALIFYING)[0] for one in (best, *others)}
        best = max(gains, key=lambda one: statistics.median(gains[one]))
    last, better, plain = _pairs(measure, best, defaults, goal, PAIRS)
    gain = statistics.median(last)
    if min(last) <= 0 or gain <= MARGIN:
        return Found(defaults, defaults, 0.0, plain, plain, tried)
    return Found(best, defaults, gain, better, plain, tried)


def _pairs(
    measure: Measure, settings: Settings, defaults: Settings, goal: str, count: int
) -> tuple[list[float], Figures, Figures]:
    """Replays settings and the defaults in turns: the gain of each pair, and the figures of both."""
    sides: dict[Settings, list[Figures]] = {settings: [], defaults: []}
    for pair in range(count):
        for one in (settings, defaults) if pair % 2 else (defaults, settings):  # what comes second has no advantage
            sides[one] += _some(measure(one), 1)
    plain, better = _mean(sides[defaults]), _mean(sides[settings])
    gains = [
        value(goal, a, None) / value(goal, b, plain) - 1 for a, b in zip(sides[defaults], sides[settings], strict=True)
    ]  # fmt: skip
    return gains, better, plain


def _some(iterator: Iterator[Figures], count: int) -> Iterator[Figures]:
    for _, figures in zip(range(count), iterator, strict=False):
        yield figures


def _mean(replays: Sequence[Figures]) -> Figures:
    """The median of each figure."""
    columns = [asdict(one) for one in replays]
    return Figures(**{name: statistics.median(one[name] for one in columns) for name in columns[0]})


def _suggest(trial: Any, name: str, values: Sequence[Any]) -> Any:
    return trial.suggest_categorical(name, list(values)) if len(values) > 1 else values[0]


def import_optuna() -> Any:
    """Optuna. Raises MissingPackageError if it is not installed."""
    try:
        import optuna
    except ImportError:
        raise MissingPackageError("dso tune", "optuna", "tune") from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna
