"""Replays a trace on an imagined machine: the engine's own core, scheduler and cache, but steps only take virtual time.

Hours of requests take seconds, so that policies of scheduling and settings can be compared. Which drafts are accepted depends
on the text: on what a real model has answered (`Texts`), or else each one is with a probability that the trace gives for its
request.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, Protocol

from ..cache.block_manager import BLOCK_TOKENS, BlockManager
from ..engine.core import EngineCore
from ..engine.draft import Draft
from ..engine.model_facts import ModelFacts
from ..engine.options import EngineOptions
from ..engine.scheduling.policy import Policy
from ..engine.sequence import Sequence
from ..engine.speculative.base import Proposer
from ..engine.speculative.drafting import Drafting
from ..engine.speculative.prompt_lookup import PromptLookupProposer
from .replay import replay
from .settings import Figures
from .steps import Record, StepLoad, load_of
from .traces import Trace, prompts

_VOCABULARY, _CONTEXT = 32_000, 1 << 17
_TOKEN = 1  # that every answer consists of that is not known
_DRAFTS = 8  # of a round, at most


class StepMachine(Protocol):
    """What steps cost, and the cache.

    Attributes:
        blocks: of the cache, each for 32 tokens.
        token_bytes: of the cache.
    """

    @property
    def blocks(self) -> int: ...

    @property
    def token_bytes(self) -> float: ...

    def seconds(self, load: StepLoad) -> float:
        """What a step takes."""


@dataclass(frozen=True)
class Machine:
    """A machine whose steps have given costs, in seconds.

    Attributes:
        step: of each step.
        row: of each decoded token or draft.
        prompt: of each prompt token.
        context: of each token that a decoded one attends to.
        blocks, token_bytes: see `StepMachine`.
    """

    step: float = 0.02
    row: float = 0.0005
    prompt: float = 0.002
    context: float = 1e-7
    blocks: int = 4096
    token_bytes: float = 28_672

    def seconds(self, load: StepLoad) -> float:
        return self.step + self.row * load.rows + self.prompt * load.prompt + self.context * load.attended


@dataclass(frozen=True)
class Texts:
    """What a real model read and wrote in a replay of the trace, which is repeated.

    Attributes:
        prompts, answers: tokens by request.
        context, chunk: see `ModelFacts`.
        lookup: largest number of drafts of a round by prompt lookup; 0: none.
        layers: the same by what drafts with the probabilities of the trace.
    """

    prompts: list[list[int]]
    answers: list[list[int]]
    context: int = _CONTEXT
    chunk: int | None = None
    lookup: int = 0
    layers: int = 0


class _Memory:
    """Blocks without content."""

    state_interval = 0

    def __init__(self, machine: StepMachine) -> None:
        self.manager = BlockManager(machine.blocks)
        self._bytes = machine.token_bytes * BLOCK_TOKENS

    @property
    def used_bytes(self) -> float:
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
    """Replaces `engine.runner.Runner`: tokens are known before."""

    on_host, decodes = True, False

    def __init__(self, machine: StepMachine, texts: list[list[int]]) -> None:
        self.machine, self.now = machine, 0.0
        self._texts, self._next = texts, list[int]()

    def check_weights(self) -> None:
        pass

    def step(self, parts: list[Any], rows: list[int], **_: Any) -> Any:
        import numpy as np

        self.now += self.machine.seconds(load_of(parts))
        after = [token_at(self._texts, part.sequence, part.start + n + 1) for part in parts for n in range(len(part.ids))]
        self._next = [after[row] for row in rows]
        return SimpleNamespace(logits=np.zeros((len(rows), 1), np.float32), last_hidden=None, draft_states=None)

    def choose_tokens(self, logits: Any, choices: Any) -> tuple[list[int], Any]:
        return self._next, logits

    def crop(self, sequences: list[Any], tokens: list[int]) -> None:
        for sequence, count in zip(sequences, tokens, strict=True):
            sequence.blocks.crop(count)


def token_at(texts: list[list[int]], sequence: Sequence, place: int) -> int:
    """The token at a place of a request's prompt and answer."""
    text = texts[sequence.index - 1]  # the core numbers requests from 1 on
    return text[place] if place < len(text) else _TOKEN


class _Proposer:
    """Drafts that are accepted with the probability of their request."""

    name, wants_states = "simulated", False

    def __init__(self, trace: Trace, texts: list[list[int]], seed: int = 0) -> None:
        self._trace, self._texts, self._random = trace, texts, random.Random(seed)

    def ready(self, sequence: Sequence) -> bool:
        return self._trace[sequence.index - 1].accepted > 0

    def propose(self, sequences: list[Sequence], max_drafts: list[int]) -> list[Draft]:
        found = []
        for sequence, count in zip(sequences, max_drafts, strict=True):
            rate, begin = self._trace[sequence.index - 1].accepted, len(sequence.tokens)
            right = [token_at(self._texts, sequence, begin + n) for n in range(count)]
            found.append(Draft([token if self._random.random() < rate else token + 1 for token in right]))
        return found

    def follow(self, sequence: Sequence, states: Any) -> None:
        pass

    def catch_up(self, sequences: list[Sequence]) -> None:
        pass

    def fork(self, sequence: Sequence, twin: Sequence) -> None:
        pass

    def forget(self, sequence: Sequence) -> None:
        pass


def simulate(
    trace: Trace,
    options: EngineOptions,
    machine: StepMachine,
    policy: Policy | None = None,
    texts: Texts | None = None,
    record: Record | None = None,
) -> Figures:
    """What a replay of the trace would show.

    Args:
        trace: the requests.
        options: of the engine.
        machine: what steps cost.
        policy: see `EngineCore`.
        texts: what a real model read and wrote; None: prompts of random tokens, and drafts by their probabilities.
        record: see `replay`.
    """
    if texts is None:
        texts = Texts(prompts(trace, _no_text, [], _VOCABULARY), [[] for _ in trace], layers=_DRAFTS)
    whole = [[*prompt, *answer] for prompt, answer in zip(texts.prompts, texts.answers, strict=True)]
    runner: Any = _Runner(machine, whole)
    memory: Any = _Memory(machine)
    vocabulary = 1 + max(map(max, whole), default=_VOCABULARY)
    facts = ModelFacts(max(_VOCABULARY, vocabulary), hidden_size=1, context=texts.context, eos=frozenset(), chunk=texts.chunk)

    def clock() -> float:
        return float(runner.now)

    def sleep(seconds: float) -> None:
        runner.now += seconds

    proposers: list[tuple[Proposer, int]] = []
    if texts.lookup:
        proposers.append((PromptLookupProposer(), texts.lookup))
    if texts.layers and any(request.accepted for request in trace):
        proposers.append((_Proposer(trace, whole), texts.layers))
    core = EngineCore(runner, memory, facts, options, proposers=proposers or None, clock=clock, policy=policy)
    if proposers:
        core.drafting = Drafting(proposers, core.times, clock)
    engine = SimpleNamespace(core=core)
    return replay(engine, nullcontext, trace, texts.prompts, clock=clock, sleep=sleep, record=record)


def _no_text(text: str) -> list[int]:
    """A simulated model has no tokenizer: four characters are a token."""
    return [1] * max(1, len(text) // 4)
