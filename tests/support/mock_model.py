"""A model that is a hash of its context, over a real block manager: any mistake with blocks or tokens changes its output.

It stores tokens in blocks as a real model stores keys and values, and reads its context through the step's block tables. A
block that was shared wrongly, freed too early or written twice changes the text; `expected` returns the correct text.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from deepseek_optimizer.backends.decoding import Decoded, RowChoice, TokenPenalties
from deepseek_optimizer.backends.reference.device_choice import choose_on_device
from deepseek_optimizer.backends.sampling import GREEDY, NOT_FINITE, apply_changes, choose_tokens
from deepseek_optimizer.cache import HOLE, BlockManager, Forgetting, Groups
from deepseek_optimizer.cache.block_manager import BLOCK_TOKENS
from deepseek_optimizer.engine.core import EngineCore
from deepseek_optimizer.engine.engine import Completion
from deepseek_optimizer.engine.model_facts import ModelFacts
from deepseek_optimizer.engine.options import EngineOptions
from deepseek_optimizer.engine.request import Request, SamplingParams
from deepseek_optimizer.engine.runner import choose_rows
from deepseek_optimizer.engine.sampling.token_rules import rules_of
from deepseek_optimizer.engine.sequence import Part

VOCAB = 61
BLOCK_BYTES = 8 * BLOCK_TOKENS
STATE_TOKENS = 2048  # maximum length of a text with recurrent states that are saved
EOS = 60


def next_token(context: list[int]) -> int:
    """The next token; occasionally the end of the text."""
    return random.Random(hash(tuple(context))).randrange(VOCAB)


def logits_of(context: list[int]) -> np.ndarray:
    """float32 [VOCAB], the largest at `next_token`."""
    made = np.random.default_rng(abs(hash(tuple(context)))).standard_normal(VOCAB).astype(np.float32)
    made[next_token(context)] = 6
    return made


def places(length: int, forgetting: Forgetting | None = None) -> np.ndarray:
    """The visible tokens of the last of a sequence's first `length` tokens, ascending, in one group of layers."""
    every = np.arange(length)
    return every if forgetting is None else every[(every < forgetting.sinks) | (every >= length - forgetting.window)]


def groups_of(forgetting: Forgetting | None | Groups) -> Groups:
    return forgetting if isinstance(forgetting, tuple) else (forgetting,)


def expected(
    prompt: list[int], max_tokens: int, eos: int | None = EOS, forgetting: Forgetting | None | Groups = None
) -> list[int]:
    """The greedy text: a token depends on what each group of layers sees."""
    text: list[int] = []
    while len(text) < max_tokens:
        context = prompt + text
        text.append(next_token([context[n] for group in groups_of(forgetting) for n in places(len(context), group)]))
        if text[-1] == eos:
            break
    return text


class MockMemory:
    """Tokens in blocks, and the manager of the blocks. With `slots`, also recurrent states: each is the text so far."""

    def __init__(self, blocks: int, forgetting: Forgetting | None | Groups = None, slots: int = 0) -> None:
        self.manager = BlockManager(blocks, groups_of(forgetting), slots=BlockManager(slots) if slots else None)
        self.state_interval = 64 if slots else 0
        self.states: dict[int, list[int]] = {}
        self.cells = np.full((blocks, BLOCK_TOKENS), -1, np.int64)
        self._lock = threading.Lock()

    @contextmanager
    def locked(self) -> Iterator[BlockManager]:
        with self._lock:
            yield self.manager

    def copy_blocks(self, copies: list[tuple[int, int]]) -> None:
        for source, target in copies:
            self.cells[target] = self.cells[source]

    def read_block(self, block: int) -> bytes:
        return self.cells[block].tobytes()

    def write_block(self, block: int, data: bytes) -> None:
        self.cells[block] = np.frombuffer(data, np.int64)

    def read_state(self, slot: int) -> bytes:
        text = np.array(self.states[slot], np.int64)
        return np.pad(text, (0, STATE_TOKENS - len(text)), constant_values=-1).tobytes()

    def write_state(self, slot: int, data: bytes) -> None:
        text = np.frombuffer(data, np.int64)
        self.states[slot] = text[text >= 0].tolist()

    def drop_blocks(self, sequence, first_block, count):
        with self.locked():
            sequence.drop(first_block, count, lambda copies, blocks: self.copy_blocks(copies))

    def read(self, blocks: list[int], tokens: np.ndarray) -> list[int]:
        """The tokens at these places of a sequence, none of which may be dropped."""
        held = np.array(blocks)[tokens // BLOCK_TOKENS]
        assert (held != HOLE).all() and all(self.manager.users(block) for block in set(held.tolist()))
        result: list[int] = self.cells[held, tokens % BLOCK_TOKENS].tolist()
        return result

    def release_unused(self):
        pass

    def run(self, plan, batch):
        raise AssertionError("the mock runner does not use plans")


def allowed(logits: np.ndarray, choice: RowChoice, step: int) -> np.ndarray:
    """The logits without the tokens that a step of a call must not choose."""
    if choice.barred is None or step >= choice.barred_steps:
        return logits
    logits = logits.copy()
    logits[choice.barred] = -np.inf
    return logits


def penalized(logits: np.ndarray, penalties: TokenPenalties | None, tokens: list[int]) -> np.ndarray:
    """The logits after penalties, by the engine's rules."""
    if penalties is None:
        return logits
    sampling = SamplingParams(
        repetition_penalty=penalties.repetition, repetition_window=penalties.window or None,
        frequency_penalty=penalties.frequency, presence_penalty=penalties.presence,
    )  # fmt: skip
    logits = logits.copy()
    for rule in rules_of(sampling, tokens[: penalties.prompt], VOCAB):
        for token in tokens[penalties.prompt :]:
            rule.add(token)
        apply_changes(logits, rule.changes())
    return logits


class MockRunner:
    """Replaces `engine.runner.Runner`.

    Attributes:
        seen: (tokens, sequences) of every step.
        broken: tokens after which the logits are NaN.
        before: is called before each step.
        decodes: whether `decode` may be called.
        undecided: the fraction of its steps whose tokens it leaves to the engine.
    """

    on_host, decodes, undecided = True, False, 0.2

    def __init__(self, memory: MockMemory) -> None:
        self.memory, self.seen, self.broken, self.before = memory, [], set(), lambda: None

    def check_weights(self):
        pass

    def choose_tokens(self, logits, choices):
        if not self.on_host:
            return choose_rows(choose_on_device, logits, choices)
        rows = logits.numpy()
        return choose_tokens(rows, choices), rows

    def decode(self, parts, call, *, draft_states=False):
        """Several steps, until a token of `call.stops`, up to `call.steps`, or at random."""
        rng, chosen, logits, states, kept = random.Random(len(self.seen)), [], None, [], []
        texts = [list(part.sequence.tokens) for part in parts]
        for step in range(rng.randrange(1, call.steps + 1)):
            if step:
                for part in parts:
                    part.sequence.blocks.tokens += 1
            output = self.step(parts, list(range(len(parts))), draft_states=True)
            made, states = output.logits, [*states, output.draft_states]
            kept.append(made)
            choices = [GREEDY if r.numbers is None else r.filters._replace(u=r.numbers[step]) for r in call.rows]
            rows = [
                allowed(penalized(row, choice.penalties, part.sequence.tokens), choice, step)
                for row, choice, part in zip(made.numpy(), call.rows, parts, strict=True)
            ]
            tokens = choose_tokens(np.array(rows), choices)
            if NOT_FINITE in tokens or rng.random() < self.undecided:
                logits = made
                break
            chosen.append(tokens)
            for part, token in zip(parts, tokens, strict=True):
                part.sequence.tokens.append(token)
            parts = [Part(p.sequence, [t], p.start + 1) for p, t in zip(parts, tokens, strict=True)]
            if set(tokens) & set(call.stops.tolist()):
                break
        for part, text in zip(parts, texts, strict=True):
            part.sequence.tokens[:] = text
        return Decoded(
            np.array(chosen, np.int32).reshape(-1, len(parts)), logits, torch.stack(states) if draft_states else None,
            torch.stack(kept) if call.keep_logits else None,
        )  # fmt: skip

    def step(self, parts, rows, *, last_hidden=False, draft_states=False):
        self.before()
        order = [(p.quality, p.phase) for p in parts]
        assert order == sorted(order)
        made, at = [], 0
        wanted = set(rows)
        hidden = []
        self.pass_states(parts)
        for part in parts:
            tables = [table.blocks for table in part.sequence.blocks.tables]
            assert part.sequence.cached >= part.start + len(part.ids)
            tokens = np.array([*part.sequence.tokens[: part.start], *part.ids])
            for blocks in tables:
                for n, token in enumerate(part.ids):
                    place = part.start + n
                    block = blocks[place // BLOCK_TOKENS]
                    assert self.memory.manager.users(block) >= 1
                    self.memory.cells[block, place % BLOCK_TOKENS] = token
                there = np.flatnonzero(np.repeat(np.array(blocks) != HOLE, BLOCK_TOKENS)[: len(tokens)])
                assert self.memory.read(blocks, there) == tokens[there].tolist()
            for n in range(len(part.ids)):
                hidden.append(part.ids[n])
                if at + n in wanted:
                    context = []
                    for blocks, group in zip(tables, self.memory.manager.groups, strict=True):
                        context += self.memory.read(blocks, places(part.start + n + 1, group))
                    row = logits_of(context)
                    made.append(row * np.nan if part.ids[n] in self.broken else row)
            at += len(part.ids)
        self.seen.append((at, len(parts)))
        states = torch.tensor(hidden, dtype=torch.float32)[:, None]
        return SimpleNamespace(
            logits=torch.from_numpy(np.array(made, np.float32).reshape(-1, VOCAB)),
            last_hidden=states if last_hidden else None,
            draft_states=states if draft_states else None,
        )

    def pass_states(self, parts):
        """Checks the states that the sequences continue from, and stores those after their rows."""
        if not self.memory.manager.slots:
            return
        stored, read = {}, {}
        for part in parts:
            source, targets = part.sequence.blocks.states.step(part.start, len(part.ids))
            text = [*part.sequence.tokens[: part.start], *part.ids]
            assert self.memory.states[source] == text[: part.start] if part.start else source == -1
            read.setdefault(source, []).append(part)
            assert targets[-1][0] == len(part.ids) - 1 and [row for row, _ in targets] == sorted(row for row, _ in targets)
            for row, slot in targets:
                assert slot not in stored and self.memory.manager.slots.users(slot) == 1
                stored[slot] = text[: part.start + row + 1], part, row == len(part.ids) - 1
        for slot, (text, part, last) in stored.items():
            assert slot not in read or (read[slot] == [part] and last)
            self.memory.states[slot] = text

    def crop(self, sequences, tokens):
        for sequence, count in zip(sequences, tokens, strict=True):
            sequence.blocks.crop(count)


class ByteTokenizer:
    """One token per character, from "A" on."""

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [ord(c) - 65 for c in text]}

    def decode(self, ids, skip_special_tokens=True, clean_up_tokenization_spaces=False):
        return "".join(chr(65 + i) for i in ids if not (skip_special_tokens and i == EOS))


class Clock:
    """Advances by a millisecond with every call."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 0.001
        return self.now


def make_core(
    blocks: int = 64, context: int = 10_000, chunk: int | None = None, proposers=None, forgetting=None, slots=0, store=None,
    **options,
) -> EngineCore:  # fmt: skip
    memory = MockMemory(blocks, forgetting, slots)
    facts = ModelFacts(vocab_size=VOCAB, hidden_size=1, context=context, eos=frozenset([EOS]), chunk=chunk)
    options = EngineOptions(**options)
    return EngineCore(MockRunner(memory), memory, facts, options, ByteTokenizer(), proposers, clock=Clock(), store=store)


# Kinds of caches: options of `make_core`.
WINDOW = Forgetting(window=100, sinks=0, spare=64)
CACHE_KINDS: dict[str, dict[str, Any]] = {
    "full": {},
    "states": {"slots": 40},
    "groups": {"forgetting": (None, WINDOW, WINDOW), "blocks": 200},
    "window": {"forgetting": WINDOW},
}


def expected_of(kind: str, prompt: list[int], count: int = 5) -> list[int]:
    """The text that the model generates with a kind of cache."""
    return expected(prompt, count, None, CACHE_KINDS[kind].get("forgetting"))


def blocks_in_use(core: EngineCore) -> int:
    """Number of blocks that are neither free nor held only by the prefix cache."""
    manager = core.memory.manager
    return manager.num_blocks - manager.free_blocks - (core.prefix.unused if core.prefix else 0)


def run_with_arrivals(
    core: EngineCore, requests: list[Request], rng: random.Random, forgetting: Forgetting | None | Groups
) -> None:
    """Runs requests that arrive at random, some of which are cancelled, and checks every answer against `expected`."""
    waiting, actual, cancelled = list(requests), {}, set()
    while waiting or not core.idle:
        for _ in range(rng.randrange(4)):
            if waiting:
                actual[waiting[0].id] = Completion()
                core.add(waiting.pop(0))
        if rng.random() < 0.03 and actual and actual[victim := rng.choice(list(actual))].finish is None:
            core.cancel(victim)
            cancelled.add(victim)
        for output in core.step():
            actual[output.request_id].add(output)
    for request in requests:
        answer, wanted = actual[request.id], expected(request.prompt, request.sampling.max_tokens, None, forgetting)
        if answer.finish == "cancelled":
            assert request.id in cancelled and answer.token_ids == wanted[: len(answer.token_ids)]
        else:
            assert answer.finish == "length" and answer.token_ids == wanted
    core.scheduler.close()
    assert blocks_in_use(core) == 0
