"""Learns while the engine runs which limits of steps serve its requests best: a contextual bandit with a guard.

The arms are the engine's own limits and a few around them. One arm is in force until the engine has been idle, or for at most
_LONGEST steps: with shorter periods an arm could leave to the next one what it has neglected. A period yields the progress of
its requests, in seconds that a token takes in a small batch, per request and second that it was in the engine: requests cost
time whether they are processed or wait (Little's law: their mean number is proportional to the mean latency). For throughput,
the yield is the progress per second.

Yields are compared within a context: whether many requests are in the engine, whether they are long, and whether drafts are
accepted when a period begins. There the arm is chosen by discounted Thompson sampling (`ArmValues`). The engine's own limits
are in force in every _FIXED-th period of a context, so that there is always something to compare with, and whenever the others
have used up their credit (`Credit`). Does not import torch.
"""

from __future__ import annotations

import logging
import random
from collections import Counter
from dataclasses import replace

from .arm_values import ArmValues
from .credit import Credit
from .policy import Load, Progress, StepLimits
from .step_times import StepTimes

GOALS = ("latency", "throughput")
_log = logging.getLogger(__name__)
_SHORTEST, _LONGEST = 16, 128  # steps of a period
_FADING = 0.99  # weight of earlier periods of a context after each new one
_FIXED = 12
_FIRST_FIXED = 2  # periods of a context with the engine's own limits before others are tried
_SHARE, _FIRST, _MOST = 0.03, 2.0, 4.0  # of `Credit`
_MANY, _LONG, _ACCEPTED = 4, 1024, 0.5  # bounds of contexts: requests, tokens, and share of drafts
_ROWS = 2  # a generated token counts for its share of a step with so many
_ANSWER, _ANSWER_WEIGHT = 128.0, 0.02  # assumed length of answers, and the weight of each new one in it
_LOGGED = 500  # periods between log messages

Context = tuple[bool, bool, bool]


def arms_around(limits: StepLimits, drafts: int) -> list[StepLimits]:
    """The limits to choose from: the given ones first, then others for prompts, and fewer sequences at once.

    Args:
        limits: the engine's own.
        drafts: largest number of drafts of a request; 0: there are none.
    """
    few = max(1, limits.batch // 4)
    if limits.stall is None:
        found = [limits, replace(limits, stall=2.5), replace(limits, batch=few)]
    else:
        more = limits.stall - 1
        found = [limits, replace(limits, stall=1 + 3 * more), replace(limits, batch=few, stall=None)]
    if drafts:
        found.append(replace(limits, drafts=max(1, drafts // 4)))
    return list(dict.fromkeys(found))


class LearnedPolicy:
    """A policy that learns (see `Policy`). The same steps and the same seed give the same decisions.

    Args:
        limits: the engine's own.
        times: measured step times.
        goal: of `GOALS`.
        drafts: largest number of drafts of a request; 0: there are none.
        seed: of the choices.

    Attributes:
        decisions: number of periods by limits.
        regret: seconds lost so far to not having had the best arm of each context in force, by the present estimates.
        credit: what may be tried.
    """

    learns = True

    def __init__(self, limits: StepLimits, times: StepTimes, goal: str, drafts: int = 0, seed: int = 0) -> None:
        self.arms = arms_around(limits, drafts)
        self.decisions: Counter[StepLimits] = Counter()
        self.credit = Credit(_SHARE, _FIRST, _MOST)
        self._times, self._goal, self._rng = times, goal, random.Random(seed)
        self._values: dict[Context, ArmValues] = {}
        self._periods: Counter[Context] = Counter()
        self._seconds_of: dict[Context, list[float]] = {}  # by arm
        self._load, self._answer = Load(0, 0, 0.0, 0.0), _ANSWER
        self._context, self._arm, self._steps = (False, False, False), 0, 0
        self._gain = self._cost = self._seconds = 0.0

    def limits(self, load: Load | None) -> StepLimits:
        assert load is not None
        self._load = load
        if self._steps >= _LONGEST or (self._steps >= _SHORTEST and not load.running):
            self._end_period()
        if not self._steps:
            self._begin_period(load)
        return self.arms[self._arm]

    def stepped(self, seconds: float, progress: list[Progress]) -> None:
        self._steps += 1
        token, prompt = self._times.decode(_ROWS), self._times.prompt
        if token is None or prompt is None:  # nothing is known of what tokens cost
            return
        token /= _ROWS
        requests = max(len(progress), self._load.waiting + self._load.running)
        self._seconds += seconds
        self._cost += seconds * (requests if self._goal == "latency" else 1)
        for one in progress:
            before = one.prompt_left * prompt + min(one.answer_left, self._answer) * token
            after = (one.prompt_left - one.prompt) * prompt + min(one.answer_left - one.generated, self._answer) * token
            self._gain += before if one.answer is not None else before - after
            if one.answer:
                self._answer += _ANSWER_WEIGHT * (one.answer - self._answer)

    @property
    def regret(self) -> float:
        found = 0.0
        for context, values in list(self._values.items()):  # a copy: metrics are read on another thread
            yields = [values.relative(arm) for arm in range(len(self.arms))]
            for own, seconds in zip(yields, self._seconds_of[context], strict=True):
                found += seconds * (1 - own / max(yields))
        return found

    def _begin_period(self, load: Load) -> None:
        many, long = load.waiting + load.running > _MANY, load.context > _LONG
        self._context = (many, long, load.acceptance > _ACCEPTED)
        if self._context not in self._values:
            self._seconds_of[self._context] = [0.0] * len(self.arms)
            self._values[self._context] = ArmValues(len(self.arms), _FADING)
        values = self._values[self._context]
        sampled = values.sample(self._rng)
        fixed = values.count(0) < _FIRST_FIXED or self._periods[self._context] % _FIXED == 0 or not self.credit.left
        self._arm = 0 if fixed else sampled
        self._periods[self._context] += 1
        self._gain = self._cost = self._seconds = 0.0

    def _end_period(self) -> None:
        self._steps = 0
        if not self._cost or self._gain <= 0:
            return
        values = self._values[self._context]
        known, saved = values.ratio(0), 0.0
        if self._arm and known:
            saved = self._seconds * (self._gain / self._cost / known - 1)
        self.credit.add(self._seconds, saved)
        values.add(self._arm, self._gain, self._cost)
        self._seconds_of[self._context][self._arm] += self._seconds
        self.decisions[self.arms[self._arm]] += 1
        if (periods := self.decisions.total()) % _LOGGED == 0:
            most, count = self.decisions.most_common(1)[0]
            _log.info(
                "learned policy: %d periods, %d of them with %s; about %.1f s lost to trying others, credit %.1f s",
                periods, count, most, self.regret, self.credit.seconds,
            )  # fmt: skip
