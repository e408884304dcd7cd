"""`dso tune --kernels`: measures how the kernels of backend `cuda` divide their work best, by steps of a model on its card.

What is found holds for the card, whatever model it was found with; a model with the shapes that matter should be taken.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ..backends.base import BLOCK_TOKENS, DECODE, PREFILL, StepBatch
from ..backends.cuda.alternative import Choice
from ..backends.cuda.alternatives import available, choice_of, named, with_rows
from ..backends.cuda.cost_table import Card, choices_for, content
from ..backends.cuda.division import Division
from ..backends.cuda.tuning import Gain, Work, faster_rows, tune
from ..checkpoint.atomic import atomic_file
from ..errors import ConfigError
from ..integration.bind.runtime import runtime_of
from ..integration.bind.swap import weights_of

CONTEXT = 1024  # tokens in the cache before a step of decoding
PROMPT = 512  # rows of a step of a prompt
STEPS = {"decode": 20, "prompt": 3}  # in one measurement
_WARM = 3  # steps before: the first compiles kernels, the second is captured
_HELD = 2  # plans: the best so far and the one that is compared with it


@dataclass(frozen=True)
class TunedKernels:
    """What was found.

    Attributes:
        start, best: how work was divided before, and is divided best.
        gains: what was changed.
        alternatives: parts of other packages that are faster than kernels.
        path: the file that later loads on this card read.
    """

    start: Division
    best: Division
    gains: list[Gain]
    alternatives: list[Choice]
    path: Path

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "path": str(self.path)}


class StepTimes:
    """Times steps of a model with some divisions: `tuning.Measure`. The weights are those of the model; its cache is not used.

    Args:
        model: loaded on a card.
        clock: of seconds.

    Raises:
        ConfigError: the model does not run on backend `cuda`, or has experts on the CPU.
    """

    def __init__(self, model: Any, clock: Callable[[], float] = time.perf_counter) -> None:
        self._runtime, self._clock = runtime_of(model), clock
        backend = self._runtime.backend
        if not backend.capabilities.kernel_divisions:
            raise ConfigError(f'kernels are those of backend "cuda", but the model runs on {backend.name}; use --device cuda')
        if self._runtime.compile_options.host_experts:
            raise ConfigError("some experts of the model run on the CPU; tune the kernels with a model that fits on the device")
        self._backend: Any = backend
        graph = self._runtime.graph
        blocks = -(-(CONTEXT + PROMPT) // BLOCK_TOKENS)
        self._store = backend.new_store(graph, self._runtime.kv_dtype, graph.cache.groups * blocks, 1 if graph.states else 0)
        self._table = np.arange(graph.cache.groups * blocks, dtype=np.int32).reshape(graph.cache.groups, 1, blocks)
        self._plans: dict[tuple[Division, str | None], Any] = {}

    @property
    def start(self) -> Division:
        """How the model's plan divides work."""
        division: Division = self._backend.division
        return division

    def __call__(self, division: Division, work: Work) -> float:
        rows = 1 if work == "decode" else PROMPT
        return self._seconds(self._plan(division), self._batch(work, rows), STEPS[work])

    def alternatives(self, division: Division) -> list[str]:
        """The alternatives that run on the card, and that fit any product of the model."""
        found = available(self._backend.device)
        return [each.name for each in found if self._plan(division).fits(each)]

    def prompt(self, division: Division, alternative: str | None, rows: int) -> float:
        """Seconds of a step of a prompt with a number of rows, with an alternative or without any."""
        return self._seconds(self._plan(division, alternative), self._batch("prompt", rows), STEPS["prompt"])

    def _seconds(self, plan: Any, batch: StepBatch, steps: int) -> float:
        try:
            for _ in range(_WARM):
                plan.run(batch, self._store)
        except Exception as error:  # Triton's, such as too little shared memory, have a base class of their own
            if any(base.__module__.partition(".")[0] == "triton" for base in type(error).__mro__):
                raise RuntimeError(str(error)) from error
            raise
        began = self._clock()
        for _ in range(steps):
            plan.run(batch, self._store)
        return (self._clock() - began) / steps

    def _plan(self, division: Division, alternative: str | None = None) -> Any:
        key = division, alternative
        if key not in self._plans:
            while len(self._plans) >= _HELD:
                del self._plans[next(iter(self._plans))]
            runtime = self._runtime
            others = () if alternative is None else (with_rows(named(alternative), 1),)
            self._plans[key] = self._backend.divided(division, others).compile(
                runtime.graph, weights_of(runtime.model, runtime.graph), runtime.compile_options
            )
        self._plans[key] = self._plans.pop(key)  # the one that was used last goes last
        return self._plans[key]

    def _batch(self, work: Work, rows: int) -> StepBatch:
        """A token after a context, or a prompt, with the logits of its last token."""
        context, phase = (CONTEXT, DECODE) if work == "decode" else (0, PREFILL)
        one = lambda value: np.array([value], np.int32)  # noqa: E731
        positions = np.arange(context, context + rows, dtype=np.int32)
        states: dict[str, Any] = {}
        if self._runtime.graph.states:
            # A context of this length has a state, whatever it is; a prompt begins without one.
            states = {"state_from": one(0 if context else -1), "state_to": np.array([[rows - 1, 0]], np.int32)}
        table = self._table if len(self._table) > 1 else self._table[0]
        return StepBatch(
            np.zeros(rows, np.int32), positions, one(rows), one(context), one(phase), table, one(rows - 1), **states
        )


def tune_kernels(model: Any, card: Card, note: Callable[[str], None] = lambda _: None) -> TunedKernels:
    """Finds how work is divided best on a card, and which alternatives are faster than its kernels then, and writes it to the
    user's cache directory. What was found earlier of alternatives that do not fit this model stays.

    Args:
        model: loaded on the card.
        card: the card.
        note: called with progress.

    Raises:
        ConfigError: see `StepTimes`.
        OSError: the file cannot be written.
    """
    times = StepTimes(model)
    best, gains = tune(times, times.start, note)
    names, faster = times.alternatives(best), {}
    for name in names:
        if (found := faster_rows(partial(times.prompt, best), name, note)) is not None:
            faster[name] = found
    choices = [choice_of(named(name), rows) for name, (rows, _) in faster.items()]
    kept = [choice for choice in choices_for(card) if choice.name not in names]
    figures = {"gains": [asdict(gain) for gain in gains], "alternatives": {name: gain for name, (_, gain) in faster.items()}}
    path = card.path
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as file:
        file.write(content(card, best, figures, [*kept, *choices]))
    return TunedKernels(times.start, best, gains, choices, path)
