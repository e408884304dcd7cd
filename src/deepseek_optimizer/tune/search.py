"""The search: Optuna's TPE over measured replays. Replays that are clearly worse than others are ended early.

The best of many noisy measurements is an overestimate. So the few best settings are measured again, in pairs with the defaults,
and then the best of these once more. The defaults stay unless it is better in every one of the last pairs, and by more than 3%
by their median. Of settings that are equal, one in 32 passes the first of these conditions.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from ..errors import ConfigError, MissingPackageError, RequestError
from .settings import Figures, Settings, value

MARGIN = 0.03  # improvements up to this are noise
ROUNDS = 3  # replays of settings
FINALISTS, QUALIFYING = 4, 3  # settings that meet the defaults, if there are so many, and in how many pairs
PAIRS = 5  # of replays of the two sides in the end
_STARTUP = 8  # trials before TPE and pruning have something to go by

Measure = Callable[[Settings], Iterator[Figures]]  # one replay after the other


@dataclass(frozen=True)
class Trial:
    """Settings that were tried. figures: None: the replay was ended early, or failed (`error`)."""

    settings: Settings
    figures: Figures | None
    error: str = ""


@dataclass(frozen=True)
class Found:
    """The result.

    Attributes:
        best: the settings to use: the defaults, unless others are better.
        defaults: the default settings.
        gain: by how much the best settings are better at the goal: 0.2: the defaults take 1.2 times as much.
        best_figures, default_figures: measured in pairs, in the end.
        trials: all, in order.
    """

    best: Settings
    defaults: Settings
    gain: float
    best_figures: Figures
    default_figures: Figures
    trials: list[Trial] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def search(
    measure: Measure,
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
        values: of each setting, see `settings.space`.
        defaults: tried first.
        goal: of `GOALS`.
        trials: number of settings to try, the defaults among them.
        kl_budget: largest KL divergence of settings that may be chosen; None: none is allowed.
        seed: of the search.
        note: called with progress.

    Raises:
        MissingPackageError: Optuna is not installed.
        ConfigError: what the defaults raise.
    """
    optuna = import_optuna()
    tried: list[Trial] = []
    plain = _mean(list(_some(measure(defaults), ROUNDS)))
    tried.append(Trial(defaults, plain))
    note(f"defaults: {defaults}")

    def objective(trial: Any) -> float:
        chosen = {name: _suggest(trial, name, some) for name, some in values.items()}
        settings, replays = Settings(**chosen), []
        known = next((one.figures for one in tried if one.settings == settings and one.figures is not None), None)
        if known is not None:
            return value(goal, known, plain)
        iterator = measure(settings)
        try:
            for step, figures in enumerate(_some(iterator, ROUNDS)):
                if figures.kl > (kl_budget or 0.0):
                    tried.append(Trial(settings, None, f"KL divergence {figures.kl:.4f} nats"))
                    raise optuna.TrialPruned
                replays.append(figures)
                trial.report(value(goal, _mean(replays), plain), step)
                if step + 1 < ROUNDS and trial.should_prune():
                    tried.append(Trial(settings, None, "ended early"))
                    raise optuna.TrialPruned
        except (ConfigError, RequestError, MemoryError) as error:
            tried.append(Trial(settings, None, str(error)))
            raise optuna.TrialPruned from None
        finally:
            iterator.close()  # type: ignore[attr-defined]
        mean = _mean(replays)
        tried.append(Trial(settings, mean))
        note(f"{len(tried)} of {trials}: {settings}: {value(goal, mean, plain) / value(goal, plain, None):.2f} of the defaults")
        return value(goal, mean, plain)

    sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=_STARTUP)
    study = optuna.create_study(sampler=sampler, pruner=optuna.pruners.MedianPruner(n_startup_trials=_STARTUP // 2))
    own = {name: getattr(defaults, name) for name in values}
    known = all(own[name] in some for name, some in values.items())
    if known:
        study.enqueue_trial(own)  # not replayed again
    study.optimize(objective, n_trials=max(1, trials - 1) + known)
    ranked = sorted(
        (value(goal, one.figures, plain), number) for number, one in enumerate(tried) if one.figures is not None
    )  # fmt: skip
    return _confirm(measure, [tried[number].settings for _, number in ranked], defaults, goal, tried)


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
