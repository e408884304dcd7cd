"""A cost model of this machine: what steps of the engine take, fitted to the steps that replays have shown.

A step's seconds are a sum of costs, none below zero: one for each of `FEATURES` that a step has. They are fitted by least
squares (`bench/least_squares.py`), where an error counts relative to the square root of a step's time, so that the sum over all
steps comes out right. Disturbances only make steps slower: after a first fit, a step counts as at most twice what it says.

The costs belong to a number of threads and to formats of the cache and the weights (`key`). Those of a key that differs from
the defaults' in one of them are drawn towards the defaults' times a common factor, as far as its own steps do not say
otherwise; with several differences, towards the product of the ratios that these have alone. So a key that was never replayed
has costs too, and a cost that a key's replays have hardly shown, such as that of many rows at once, is not made up.

With these costs, the engine's own scheduler and cache replay the trace in virtual time (`simulation.py`).
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..bench.least_squares import nonnegative_least_squares
from ..cache.block_manager import BLOCK_TOKENS
from ..engine.options import EngineOptions
from .settings import Figures, Settings
from .simulation import Texts, simulate
from .steps import Observation, StepLoad, TimedStep

FEATURES = (
    "step", "row", "row beyond the first four", "draft", "step with a prompt", "prompt token", "token attended to",
    "token attended to by a prompt's",
)  # fmt: skip
_MANY = 2  # place of rows beyond the first four, after that of these
_FEW = 4  # rows that share what reading the weights takes
_OUTLIER = 2.0  # times the fitted seconds that a step counts as, at most
_WORTH = 2.0  # steps that must contradict a cost that was drawn from another key's, for each of these costs
_MOST_STEPS = 20_000  # of a key, the latest ones: enough for eight costs
_MOST_DRAFTS = 8  # of a round

_FORMATS = ("precision", "quality", "kv_cache")  # those of weights, and of the cache
Key = tuple[int, str, str, str]


def key(settings: Settings) -> Key:
    """What the costs of steps depend on."""
    return settings.threads, settings.kv_cache, settings.precision, settings.quality


def features(load: StepLoad) -> list[float]:
    """How much a step has of each of `FEATURES`."""
    return [
        1.0, float(min(load.rows, _FEW)), float(max(0, load.rows - _FEW)), float(load.drafts), float(load.prompt > 0),
        float(load.prompt), float(load.attended), float(load.prompt_attended),
    ]  # fmt: skip


@dataclass(frozen=True)
class StepCosts:
    """Seconds for each of `FEATURES`."""

    values: tuple[float, ...]

    def seconds(self, load: StepLoad) -> float:
        return sum(cost * count for cost, count in zip(self.values, features(load), strict=True))


@dataclass(frozen=True)
class FittedMachine:
    """A `StepMachine` with fitted costs."""

    costs: StepCosts
    blocks: int
    token_bytes: float

    def seconds(self, load: StepLoad) -> float:
        return self.costs.seconds(load)


def fit_costs(steps: Sequence[TimedStep], prior: StepCosts | None = None) -> StepCosts:
    """The costs of a key.

    Args:
        steps: measured; at least one, unless there is a prior.
        prior: costs that these are drawn towards, times the factor by which the steps differ from them; None: there are none.
    """
    import numpy as np

    if not steps:
        assert prior is not None
        return prior
    seconds = np.array([max(step.seconds, 1e-9) for step in steps])
    counts = np.array([features(step.load) for step in steps])
    pulls, pulled = np.zeros((0, len(FEATURES))), np.zeros(0)
    if prior is not None:
        weight = (_WORTH * seconds.mean()) ** 0.5
        factor = float(np.median(seconds / np.maximum(counts @ np.array(prior.values), 1e-9)))
        known = [n for n, cost in enumerate(prior.values) if cost > 0]
        pulls, pulled = np.zeros((len(known), len(FEATURES))), np.full(len(known), weight)
        for row, n in enumerate(known):
            pulls[row, n] = weight / (factor * prior.values[n])
    found = np.zeros(len(FEATURES))
    for turn in range(2):
        counted = seconds if turn == 0 else np.minimum(seconds, np.maximum(_OUTLIER * (counts @ found), 1e-9))
        root = np.sqrt(counted)
        found = nonnegative_least_squares(np.vstack([counts / root[:, None], pulls]), np.concatenate([root, pulled]))
    if prior is None and not counts[:, _MANY].any():
        found[_MANY] = found[_MANY - 1]  # nothing was seen of them
    return StepCosts(tuple(float(cost) for cost in found))


class CostModel:
    """Predicts what a replay of the trace would show with some settings.

    Args:
        defaults: the default settings, which are observed first.
        stall: of the engine's options.

    Attributes:
        steps: number of steps that it was fitted to.
        step_error: median of their relative errors.
    """

    def __init__(self, defaults: Settings, stall: float | None) -> None:
        self._defaults, self._stall = defaults, stall
        self._observed: list[Observation] = []
        self._steps: dict[Key, list[TimedStep]] = {}
        self._costs: dict[Key, StepCosts] = {}
        self._block_bytes: dict[str, float] = {}  # by cache format
        self._predicted: dict[Settings, Figures] = {}
        self._accepted = 0.0
        self.steps, self.step_error = 0, 0.0

    def add(self, observed: Observation) -> None:
        """Adds a replay."""
        self._observed.append(observed)
        known = self._steps.setdefault(key(observed.settings), [])
        known += observed.record.steps
        del known[:-_MOST_STEPS]

    def fit(self) -> None:
        """Fits the model to all replays that were added: at least one of the defaults."""
        base = key(self._defaults)
        self._predicted.clear()
        self._costs = {base: fit_costs(self._steps[base])}
        for differences in range(1, len(base) + 1):
            for each in self._steps:
                if _differences(each, base) == differences:
                    self._costs[each] = fit_costs(self._steps[each], self._prior(each))
        errors = [
            abs(self._costs[each].seconds(step.load) / step.seconds - 1)
            for each, steps in self._steps.items()
            for step in steps
            if step.seconds > 0
        ]
        self.steps, self.step_error = len(errors), statistics.median(errors)
        self._accepted = _acceptance([one.record.drafted for one in self._observed if one.layers_draft])
        self._block_bytes.clear()
        seen: dict[str, list[float]] = {}
        for one in {one.settings: one for one in self._observed}.values():
            simulated = self._simulated(one.settings, 1.0).memory_bytes
            if simulated:
                seen.setdefault(one.settings.kv_cache, []).append((one.figures.memory_bytes - one.weight_bytes) / simulated)
        self._block_bytes = {kind: statistics.median(values) for kind, values in seen.items()}

    def costs(self, settings: Settings) -> StepCosts:
        """What steps cost with some settings."""
        each = key(settings)
        return self._costs[each] if each in self._costs else self._prior(each)

    def predict(self, settings: Settings) -> Figures:
        """What a replay would show. `fit` must have been called."""
        if settings not in self._predicted:
            own = self._block_bytes.get(self._defaults.kv_cache, 0.0)
            figures = self._simulated(settings, self._block_bytes.get(settings.kv_cache, own))
            weights = self._nearest(settings, ("precision",)).weight_bytes
            self._predicted[settings] = replace(figures, memory_bytes=figures.memory_bytes + weights, kl=self._kl(settings))
        return self._predicted[settings]

    def _simulated(self, settings: Settings, token_bytes: float) -> Figures:
        """A replay in virtual time; `memory_bytes` is that of the cache."""
        one = self._nearest(settings, _FORMATS)  # answers are those of its formats
        trace = one.trace
        if one.layers_draft:
            trace = tuple(replace(request, accepted=self._accepted) for request in trace)
        texts = Texts(one.prompts, one.record.answers, one.context, one.chunk, settings.drafts, settings.drafts)
        machine = FittedMachine(self.costs(settings), self._blocks(settings), token_bytes)
        options = EngineOptions(stall=self._stall, **settings.to_options())
        return simulate(trace, options, machine, texts=texts)

    def _prior(self, each: Key) -> StepCosts:
        """The costs of a key by those of others."""
        base = key(self._defaults)
        plain = self._costs[base].values
        costs = list(plain)
        for place, value in enumerate(each):
            other = self._alone(place, value)
            if other in (base, each) or other not in self._costs:
                continue
            for n, cost in enumerate(self._costs[other].values):
                costs[n] = costs[n] * cost / plain[n] if plain[n] > 0 else max(costs[n], cost)
        return StepCosts(tuple(costs))

    def _alone(self, place: int, value: Any) -> Key:
        """The key that differs from the defaults' in one place only, by this value; of numbers of threads by the nearest one
        that was observed with the defaults' formats."""
        base = key(self._defaults)
        if place == 0:
            value = min((each[0] for each in self._steps if each[1:] == base[1:]), key=lambda threads: abs(threads - value))
        found: list[Any] = [value if n == place else part for n, part in enumerate(base)]
        return found[0], found[1], found[2], found[3]

    def _nearest(self, settings: Settings, names: Sequence[str]) -> Observation:
        """The latest observation that agrees in these settings, or else in as many of the first ones as any does."""
        for count in range(len(names), -1, -1):
            for one in reversed(self._observed):
                if all(getattr(one.settings, name) == getattr(settings, name) for name in names[:count]):
                    return one
        raise ValueError("nothing was observed")

    def _blocks(self, settings: Settings) -> int:
        """Blocks of the cache: in proportion to the batch, but enough for one text, up to the largest number that was seen."""
        seen = [(one.settings.batch, one.blocks) for one in self._observed if one.settings.kv_cache == settings.kv_cache]
        seen = seen or [(one.settings.batch, one.blocks) for one in self._observed]
        batch, blocks = min(seen, key=lambda pair: abs(pair[0] - settings.batch))
        whole = self._observed[0].context // BLOCK_TOKENS + 2  # a text may continue in the copy of a shared block
        return min(max(whole, round(blocks * settings.batch / batch)), max(blocks for _, blocks in seen))

    def _kl(self, settings: Settings) -> float:
        """That of replays with the same formats; of formats that were not replayed together, the sum."""
        known = {tuple(getattr(one.settings, name) for name in _FORMATS): one.figures.kl for one in self._observed}
        precision, quality, cache = (getattr(settings, name) for name in _FORMATS)
        if (precision, quality, cache) in known:
            return known[precision, quality, cache]
        own = self._defaults
        alone = (
            (precision, own.quality, own.kv_cache),
            (own.precision, quality, own.kv_cache),
            (own.precision, own.quality, cache),
        )
        return sum(known.get(one, 0.0) for one in alone)


def _differences(a: Key, b: Key) -> int:
    return sum(x != y for x, y in zip(a, b, strict=True))


def _acceptance(drafted: Sequence[tuple[int, int, int]]) -> float:
    """The probability that a draft is accepted after those before it were, by `Record.drafted` of replays: with it, rounds of
    the mean length have the mean number of accepted drafts."""
    rounds, proposed, accepted = (sum(column) for column in zip(*drafted, strict=True)) if drafted else (0, 0, 0)
    if not accepted:
        return 0.0
    count, mean = proposed / rounds, accepted / rounds
    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        expected = count if middle == 1 else middle * (1 - middle**count) / (1 - middle)
        low, high = (middle, high) if expected < mean else (low, middle)
    return low
