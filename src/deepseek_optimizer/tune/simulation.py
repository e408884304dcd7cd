"""Replays a trace on an imagined machine: the engine's own core, scheduler and cache, but steps only take virtual time.

A step takes `step` seconds, plus `row` for each decoding sequence, `prompt` for each prompt token, and `context` for each token
that a decoding sequence attends to. Hours of requests take seconds, so that policies of scheduling can be compared. Drafts are
not simulated: whether they are accepted depends on the text.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from types import MappingProxyType, SimpleNamespace
from typing import Any

from ..backends.base import DECODE
from ..cache.block_manager import BLOCK_TOKENS, BlockManager
from ..engine.core import EngineCore
from ..engine.model_facts import ModelFacts
from ..engine.options import EngineOptions
from .replay import replay
from .settings import Figures
from .traces import BUILT_IN, Trace, TraceRequest, prompts

_VOCABULARY, _CONTEXT = 32_000, 1 << 17


@dataclass(frozen=True)
class Machine:
    """What steps cost, in seconds, and the cache.

    Attributes:
        step, row, prompt, context: see above.
        blocks: of the cache, each for 32 tokens.
        token_bytes: of the cache.
    """

    step: float = 0.02
    row: float = 0.0005
    prompt: float = 0.002
    context: float = 1e-7
    blocks: int = 4096
    token_bytes: int = 28_672


class _Memory:
    """Blocks without content."""

    state_interval = 0

    def __init__(self, machine: Machine) -> None:
        self.manager = BlockManager(machine.blocks)
        self._bytes = machine.token_bytes * BLOCK_TOKENS

    @property
    def used_bytes(self) -> int:
        return (self.manager.num_blocks - self.manager.free_blocks) * self._bytes

    @contextmanager
    def locked(self) -> Iterator[BlockManager]:
        yield self.manager

    def copy_blocks(self, copies: list[tuple[int, int]]) -> None:
        pass

    def release_unused(self) -> None:
        pass

    def reclaim(self, sequences: list[Any]) -> None:
        pass


class _Runner:
    """Replaces `engine.runner.Runner`: every token is 1."""

    on_host, decodes = True, False

    def __init__(self, machine: Machine) -> None:
        self.machine, self.now = machine, 0.0

    def check_weights(self) -> None:
        pass

    def step(self, parts: list[Any], rows: list[int], **_: Any) -> Any:
        import numpy as np

        cost = self.machine
        decoding = [part for part in parts if part.phase == DECODE]
        tokens = sum(len(part.ids) for part in parts if part.phase != DECODE)
        self.now += cost.step + cost.row * len(decoding) + cost.prompt * tokens
        self.now += cost.context * sum(part.start for part in decoding)
        return SimpleNamespace(logits=np.zeros((len(rows), 1), np.float32), last_hidden=None, draft_states=None)

    def choose_tokens(self, logits: Any, choices: Any) -> tuple[list[int], Any]:
        return [1] * len(logits), logits


def simulate(trace: Trace, options: EngineOptions, machine: Machine) -> Figures:
    """What a replay of the trace would show.

    Args:
        trace: the requests.
        options: of the engine: the policy.
        machine: what steps cost.
    """
    runner: Any = _Runner(machine)
    memory: Any = _Memory(machine)
    facts = ModelFacts(vocab_size=_VOCABULARY, hidden_size=1, context=_CONTEXT, eos=frozenset())

    def clock() -> float:
        return float(runner.now)

    def sleep(seconds: float) -> None:
        runner.now += seconds

    core = EngineCore(runner, memory, facts, options, clock=clock)
    engine = SimpleNamespace(core=core)
    return replay(engine, nullcontext, trace, prompts(trace, _no_text, [], _VOCABULARY), clock=clock, sleep=sleep)


def _no_text(text: str) -> list[int]:
    """A simulated model has no tokenizer: four characters are a token."""
    return [1] * max(1, len(text) // 4)


def bursty(seed: int = 0, bursts: int = 12) -> Trace:
    """Quiet, and then many requests within a second."""
    rng, found = random.Random(seed), []
    for burst in range(bursts):
        for _ in range(rng.randint(8, 24)):
            found.append(TraceRequest(20 * burst + rng.random(), rng.randint(50, 600), rng.randint(20, 200)))
    return tuple(sorted(found, key=lambda request: request.at))


def diurnal(seed: int = 0, seconds: float = 1200.0, most: float = 0.6) -> Trace:
    """A day in 20 minutes: requests at random, from none at night to `most` per second at noon."""
    rng, found, at = random.Random(seed), [], 0.0
    while (at := at + rng.expovariate(most)) < seconds:
        if rng.random() < math.sin(math.pi * at / seconds) ** 2:
            found.append(TraceRequest(at, rng.randint(50, 800), rng.randint(20, 150)))
    return tuple(found)


TRACES: Mapping[str, Callable[[], Trace]] = MappingProxyType({**BUILT_IN, "bursty": bursty, "diurnal": diurnal})
