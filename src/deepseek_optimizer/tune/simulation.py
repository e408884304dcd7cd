"""Replays a trace on an imagined machine: the engine's own core, scheduler and cache, but steps only take virtual time.

A step takes `step` seconds, plus `row` for each decoded token or draft, `prompt` for each prompt token, and `context` for each
token that one of them attends to. Hours of requests take seconds, so that policies of scheduling can be compared. Whether
drafts are accepted depends on the text; here each one is with a probability that the trace gives for its request.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from ..backends.base import DECODE
from ..cache.block_manager import BLOCK_TOKENS, BlockManager
from ..engine.core import EngineCore
from ..engine.draft import Draft
from ..engine.model_facts import ModelFacts
from ..engine.options import EngineOptions
from ..engine.scheduling.policy import Policy
from ..engine.sequence import Sequence
from ..engine.speculative.base import Proposer
from ..engine.speculative.drafting import Drafting
from .replay import replay
from .settings import Figures
from .traces import Trace, prompts

_VOCABULARY, _CONTEXT = 32_000, 1 << 17
_TOKEN = 1  # that every text consists of
_DRAFTS = 8  # of a round, at most


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
    """Replaces `engine.runner.Runner`: every token is the same."""

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
        self.now += cost.step + cost.row * sum(len(part.ids) for part in decoding) + cost.prompt * tokens
        self.now += cost.context * sum(len(part.ids) * part.start for part in decoding)
        return SimpleNamespace(logits=np.zeros((len(rows), 1), np.float32), last_hidden=None, draft_states=None)

    def choose_tokens(self, logits: Any, choices: Any) -> tuple[list[int], Any]:
        return [_TOKEN] * len(logits), logits

    def crop(self, sequences: list[Any], tokens: list[int]) -> None:
        for sequence, count in zip(sequences, tokens, strict=True):
            sequence.blocks.crop(count)


class _Proposer:
    """Drafts that are accepted with the probability of their request."""

    name, wants_states = "simulated", False

    def __init__(self, trace: Trace, seed: int = 0) -> None:
        self._trace, self._random = trace, random.Random(seed)

    def ready(self, sequence: Sequence) -> bool:
        return self._trace[sequence.index - 1].accepted > 0

    def propose(self, sequences: list[Sequence], max_drafts: list[int]) -> list[Draft]:
        found = []
        for sequence, count in zip(sequences, max_drafts, strict=True):
            rate = self._trace[sequence.index - 1].accepted  # the core numbers requests from 1 on
            found.append(Draft([_TOKEN if self._random.random() < rate else _TOKEN + 1 for _ in range(count)]))
        return found

    def follow(self, sequence: Sequence, states: Any) -> None:
        pass

    def catch_up(self, sequences: list[Sequence]) -> None:
        pass

    def fork(self, sequence: Sequence, twin: Sequence) -> None:
        pass

    def forget(self, sequence: Sequence) -> None:
        pass


def simulate(trace: Trace, options: EngineOptions, machine: Machine, policy: Policy | None = None) -> Figures:
    """What a replay of the trace would show.

    Args:
        trace: the requests.
        options: of the engine.
        machine: what steps cost.
        policy: see `EngineCore`.
    """
    runner: Any = _Runner(machine)
    memory: Any = _Memory(machine)
    facts = ModelFacts(vocab_size=_VOCABULARY, hidden_size=1, context=_CONTEXT, eos=frozenset())

    def clock() -> float:
        return float(runner.now)

    def sleep(seconds: float) -> None:
        runner.now += seconds

    drafted = any(request.accepted for request in trace)
    proposers: list[tuple[Proposer, int]] | None = [(_Proposer(trace), _DRAFTS)] if drafted else None
    core = EngineCore(runner, memory, facts, options, proposers=proposers, clock=clock, policy=policy)
    if proposers is not None:
        core.drafting = Drafting(proposers, core.times, clock)
    engine = SimpleNamespace(core=core)
    return replay(engine, nullcontext, trace, prompts(trace, _no_text, [], _VOCABULARY), clock=clock, sleep=sleep)


def _no_text(text: str) -> list[int]:
    """A simulated model has no tokenizer: four characters are a token."""
    return [1] * max(1, len(text) // 4)
