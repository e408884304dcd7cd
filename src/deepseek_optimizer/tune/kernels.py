"""`dso tune --kernels`: measures how the kernels of backend `cuda` divide their work best, by steps of a model on its card.

What is found holds for the card, whatever model it was found with; a model with the shapes that matter should be taken.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..backends.base import BLOCK_TOKENS, DECODE, PREFILL, StepBatch
from ..backends.cuda.cost_table import Card, content
from ..backends.cuda.division import Division
from ..backends.cuda.tuning import Gain, Work, tune
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
        path: the file that later loads on this card read.
    """

    start: Division
    best: Division
    gains: list[Gain]
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
        if backend.name != "cuda":
            raise ConfigError(f'kernels are those of backend "cuda", but the model runs on {backend.name}; use --device cuda')
        if self._runtime.compile_options.host_experts:
            raise ConfigError("some experts of the model run on the CPU; tune the kernels with a model that fits on the device")
        self._backend: Any = backend
        graph = self._runtime.graph
        blocks = -(-(CONTEXT + PROMPT) // BLOCK_TOKENS)
        self._store = backend.new_store(graph, self._runtime.kv_dtype, graph.cache.groups * blocks, 1 if graph.states else 0)
        self._table = np.arange(graph.cache.groups * blocks, dtype=np.int32).reshape(graph.cache.groups, 1, blocks)
        self._plans: dict[Division, Any] = {}

    @property
    def start(self) -> Division:
        """How the model's plan divides work."""
        division: Division = self._backend.division
        return division

    def __call__(self, division: Division, work: Work) -> float:
        plan, batch, steps = self._plan(division), self._batch(work), STEPS[work]
        for _ in range(_WARM):
            plan.run(batch, self._store)
        began = self._clock()
        for _ in range(steps):
            plan.run(batch, self._store)
        return (self._clock() - began) / steps

    def _plan(self, division: Division) -> Any:
        if division not in self._plans:
            while len(self._plans) >= _HELD:
                del self._plans[next(iter(self._plans))]
            runtime = self._runtime
            self._plans[division] = self._backend.divided(division).compile(
                runtime.graph, weights_of(runtime.model, runtime.graph), runtime.compile_options
            )
        self._plans[division] = self._plans.pop(division)  # the one that was used last goes last
        return self._plans[division]

    def _batch(self, work: Work) -> StepBatch:
        """A token after a context, or a prompt, with the logits of its last token."""
        rows, context, phase = (1, CONTEXT, DECODE) if work == "decode" else (PROMPT, 0, PREFILL)
        one = lambda value: np.array([value], np.int32)  # noqa: E731
        positions = np.arange(context, context + rows, dtype=np.int32)
        states: dict[str, Any] = {}
        if self._runtime.graph.states:
            states = {"state_from": one(-1), "state_to": np.array([[rows - 1, 0]], np.int32)}
        table = self._table if len(self._table) > 1 else self._table[0]
        return StepBatch(
            np.zeros(rows, np.int32), positions, one(rows), one(context), one(phase), table, one(rows - 1), **states
        )


def tune_kernels(model: Any, card: Card, note: Callable[[str], None] = lambda _: None) -> TunedKernels:
    """Finds how work is divided best on a card, and writes it to the user's cache directory.

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
    path = card.path
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as file:
        file.write(content(card, best, {"gains": [asdict(gain) for gain in gains]}))
    return TunedKernels(times.start, best, gains, path)
