"""Learns while the engine runs which limits of steps serve its requests best: from a model of its queue, with a guard.

The arms are the engine's own limits and a few around them. Requests that have ended are served again within the limits of
each arm, in virtual time (`QueueModel`), and the arm whose model has cost least so far is used next: that follows the best of
some decisions whose outcomes are all known (Kalai and Vempala 2005, "Efficient algorithms for online decision problems").
Trying arms tells less: what a period costs depends more on when requests come than on the limits. The models have got as far
as the arrival of the oldest unfinished request, since nobody knows yet how much it takes.

Models may be wrong. One arm is in force until the engine has been idle, or for at most _LONGEST steps. Besides the models of
the arms there is a twin, within the limits that were in force; when it has got to the end of such a period, what it predicts is
compared with what the period has cost (`ArmValues`). Predictions are corrected by that, and where little is known, sampled.
The engine's own limits are in force in every _FIXED-th period, so that their model is compared too, and whenever the engine has
cost more than they would have, beyond what is allowed (`Credit`).

Costs are seconds: for latency, those that requests were in the engine, in sum (Little's law: their mean number is proportional
to the mean latency); for throughput, those of steps. Does not import torch.
"""

from __future__ import annotations

import heapq
import logging
import random
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, replace

from .arm_values import ArmValues
from .credit import Credit
from .policy import Served, StepLimits
from .queue_model import QueueModel, work
from .step_times import StepTimes

GOALS = ("latency", "throughput")
_log = logging.getLogger(__name__)
_SHORTEST, _LONGEST = 8, 32  # steps of a period
_FADING = 0.997  # weight of earlier periods after each new one; not critical: results differ little from 0.98 on
_FIXED = 24  # every so many periods, the engine's own limits are in force
_FIRST_FIXED = 2  # periods with the engine's own limits before others are tried
_SHARE, _FIRST, _MOST = 0.02, 3.0, 16.0  # of `Credit`
_EVENTS = 8  # of each model, per step of the engine
_AHEAD = 512  # requests that may end before an older one; with more, the models go on without it
_LOGGED = 500  # periods between log messages


def arms_around(limits: StepLimits) -> list[StepLimits]:
    """The limits to choose from: the engine's own, which are given, then others for prompts, and fewer sequences at once."""
    few = max(1, limits.batch // 4)
    if limits.stall is None:
        found = [limits, replace(limits, stall=2.5), replace(limits, batch=few)]
    else:
        more = limits.stall - 1
        found = [limits, replace(limits, stall=1 + 3 * more), replace(limits, batch=few, stall=None)]
    return list(dict.fromkeys(found))


_State = tuple[float, float, float]  # of a model: `waited`, `busy` and `done`


@dataclass
class _Period:
    """A period: its arm, when it ended, its number of steps, what it has cost, and what they did (`work`)."""

    arm: int
    end: float = 0.0
    steps: int = 0
    cost: float = 0.0
    done: float = 0.0


class LearnedPolicy:
    """A policy that learns (see `Policy`). The same steps and the same seed give the same decisions.

    Args:
        limits: the engine's own.
        times: measured step times.
        model: makes a model of the engine's queue.
        goal: of `GOALS`.
        seed: of the choices.

    Attributes:
        decisions: number of periods by limits.
        credit: what may be lost.
    """

    learns = True

    def __init__(self, limits: StepLimits, times: StepTimes, model: Callable[[], QueueModel], goal: str, seed: int = 0) -> None:
        self.arms = arms_around(limits)
        self.decisions: Counter[StepLimits] = Counter()
        self.credit = Credit(_SHARE, _FIRST, _MOST)
        self._times, self._goal, self._rng = times, goal, random.Random(seed)
        self._models = [model() for _ in (*self.arms, limits)]
        for each, arm in zip(self._models, (*self.arms, limits), strict=True):
            each.limit(arm)
        self._twin = self._models[-1]  # its limits change as the engine's did
        self._values = ArmValues(len(self.arms), _FADING)
        self._predicted = [0.0] * len(self.arms)  # costs of earlier periods by arm, faded
        self._totals, self._spent = [0.0] * len(self.arms), 0.0  # all costs by arm, and the engine's
        self._before: list[_State] = [(0.0, 0.0, 0.0)] * len(self._models)
        self._unfinished: dict[int, float] = {}  # arrivals by request, in order
        self._served: list[tuple[float, int, Served]] = []  # a heap, by arrival
        self._period, self._ended = _Period(0), deque[_Period]()
        self._periods = self._requests = 0
        self._idle = False

    def added(self, request: int, arrived: float, now: float) -> None:
        self._unfinished[request] = arrived
        if self._goal == "latency":
            self._period.cost += now - arrived

    def ended(self, request: Served) -> None:
        heapq.heappush(self._served, (self._unfinished.pop(request.number), request.number, request))
        self._idle = self._idle or not self._unfinished

    def limits(self, now: float) -> StepLimits:
        self._run_models(now)
        if self._period.steps >= _LONGEST or (self._period.steps >= _SHORTEST and self._idle):
            self._period.end = now
            self._ended.append(self._period)
            self._period = _Period(self._choose())
        self._idle, self._requests = False, len(self._unfinished)
        return self.arms[self._period.arm]

    def stepped(self, seconds: float, prompt: int, answers: int) -> None:
        self._period.steps += 1
        self._period.cost += seconds * (self._requests if self._goal == "latency" else 1)
        self._period.done += work(self._times, prompt, answers)

    @property
    def regret(self) -> float:
        """What the engine has cost so far above the best arm in hindsight, by the present estimates."""
        known = self._values.ratio(0)
        if not known:
            return 0.0
        costs = [total / known / self._values.relative(arm) for arm, total in enumerate(self._totals)]
        return max(0.0, self._spent - min(costs))

    def _run_models(self, now: float) -> None:
        """Lets the models serve what has come before the oldest unfinished request."""
        if self._times.decode(1) is None or self._times.prompt is None:  # nothing is known of what tokens cost
            if len(self._served) > _AHEAD:
                self._served.clear()
                self._ended.clear()
            return
        until = next(iter(self._unfinished.values()), now)
        if len(self._served) > _AHEAD:
            until = max(until, self._served[0][0])
        while self._served and self._served[0][0] <= until:
            arrived, _, request = heapq.heappop(self._served)
            for model in self._models:
                model.add(arrived, request)
        events = [_EVENTS] * len(self._models)
        while True:
            ends = bool(self._ended) and self._ended[0].end <= until
            stop = self._ended[0].end if ends else until
            events = [model.run(stop, left) for model, left in zip(self._models, events, strict=True)]
            if not ends or not all(events):
                return
            self._settle(self._ended.popleft())

    def _settle(self, period: _Period) -> None:
        """Compares what a period has cost with what the models predict for all arms."""
        now = [(model.waited, model.busy, model.done) for model in self._models]
        costs = [self._cost(after, before, period.done) for after, before in zip(now, self._before, strict=True)]
        self._before = now
        *predicted, twin = costs
        self._twin.limit(self.arms[(self._ended[0] if self._ended else self._period).arm])
        if min(*predicted, twin) <= 0 or period.cost <= 0:
            return
        known = self._values.ratio(0)
        saved = predicted[0] / known - period.cost if known else 0.0
        self.credit.add(period.cost, saved)
        self._values.add(period.arm, twin, period.cost)
        self._predicted = [_FADING * old + new for old, new in zip(self._predicted, predicted, strict=True)]
        self._totals = [old + new for old, new in zip(self._totals, predicted, strict=True)]
        self._spent += period.cost
        self.decisions[self.arms[period.arm]] += 1
        if (periods := self.decisions.total()) % _LOGGED == 0:
            most, count = self.decisions.most_common(1)[0]
            _log.info(
                "learned policy: %d periods, %d of them with %s; about %.1f s lost to trying others, credit %.1f s",
                periods, count, most, self.regret, self.credit.seconds,
            )  # fmt: skip

    def _cost(self, after: _State, before: _State, done: float) -> float:
        """What a model predicts that a period costs: for throughput, that doing as much as the engine costs."""
        waited, busy, did = (new - old for new, old in zip(after, before, strict=True))
        if self._goal == "latency":
            return waited
        return done * busy / did if did > 0 else 0.0

    def _choose(self) -> int:
        self._periods += 1
        few = self._values.count(0) < _FIRST_FIXED
        if few or self._periods % _FIXED == 0 or not self.credit.left:
            return 0
        return self._values.sample(self._rng, self._predicted)
