"""MTP drafts against their definition: every layer run over all rows, from scratch, in every round."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from deepseek_optimizer.backends.base import DECODE
from deepseek_optimizer.backends.decoding import DraftedCall, RowChoice
from deepseek_optimizer.backends.reference import ReferenceBackend
from deepseek_optimizer.engine.runner import Runner
from deepseek_optimizer.engine.sampling.torch_sampler import TorchSampler
from deepseek_optimizer.engine.sequence import Part, Sequence, rows_of
from deepseek_optimizer.engine.speculative import mtp
from deepseek_optimizer.engine.speculative.draft_and_verify import SpeculativeDecoder
from deepseek_optimizer.engine.speculative.drafted_rounds import DraftedRoundCalls
from deepseek_optimizer.engine.speculative.mtp import MtpProposer
from deepseek_optimizer.errors import CacheFullError
from deepseek_optimizer.graph.ir import Graph
from deepseek_optimizer.integration.memory.arena import Arena
from deepseek_optimizer.models import build_graph, build_mtp_graph
from support import steps
from support.family_configs import deepseek_v3, llama
from support.models import random_ids, random_model, random_weights, weights_of


@dataclass
class World:
    """A random model with MTP layers on the reference backend."""

    config: Any
    plans: list[Any]
    graph: Graph
    backend: ReferenceBackend = field(default_factory=ReferenceBackend)

    @classmethod
    def make(cls, layers: int, family: Callable[..., Any] = deepseek_v3) -> World:
        config = family(num_nextn_predict_layers=layers)
        graph = build_graph(config, layers)
        backend = ReferenceBackend()
        plans = [backend.compile(graph, weights_of(random_model(config)))]
        for depth in range(layers):
            g = build_mtp_graph(config, depth)
            plans.append(backend.compile(g, random_weights(g, depth)))
        return cls(config, plans, graph, backend)

    def arena(self) -> Arena:
        return Arena(self.backend.new_store(self.graph, "fp32", 64), self.graph.cache.layers)

    def drafts(self, tokens: list[int], count: int, base: int = 0) -> list[int]:
        """The drafts of MTP layers after tokens, the last of which is not in the cache; they have no rows before `base`."""
        store = self.backend.new_store(self.graph, "fp32", 64)
        main = steps.Runner(self.plans[0], store)
        blocks, cached, drafts = main.sequence(), len(tokens) - 1, []

        def run(plan: Any, ids: list[int], start: int, states: Any) -> Any:
            batch = steps.make_batch([steps.Part(main.sequence(), ids, DECODE, rows=[len(ids) - 1])], store)
            batch.positions = batch.positions + start
            batch.block_table = table
            batch.context_len[:] = start - base
            batch.states, batch.draft_states = states, True
            return plan.run(batch, store)

        blocks.append(cached + count)
        table = blocks.table()[None, base // 32 :]
        batch = steps.make_batch([steps.Part(main.sequence(), tokens[:-1], DECODE)], store)
        batch.block_table, batch.draft_states = blocks.table()[None], True
        states = self.plans[0].run(batch, store).draft_states[base:]
        for k, plan in enumerate(self.plans[1:]):
            made = run(plan, [*tokens, *drafts][base + k + 1 : cached + k + 1], base, states)
            drafts.append(int(made.logits[0].argmax()))
            states = made.draft_states
        for further in range(count - len(drafts)):
            made = run(self.plans[-1], drafts[-1:], cached + further, states[-1:])
            drafts.append(int(made.logits[0].argmax()))
            states = made.draft_states
        return drafts[:count]


class Watched(MtpProposer):
    """Compares each proposal with the definition."""

    def __init__(self, world: World, layers: list[Runner], bases: dict[int, int]) -> None:
        super().__init__(layers, TorchSampler(sampled=False).draft, greedy=layers[-1].decodes)
        self.world, self.bases, self.compared = world, bases, 0

    def propose(self, sequences, max_drafts):
        drafts = super().propose(sequences, max_drafts)
        for s, n, d in zip(sequences, max_drafts, drafts, strict=True):
            base = self.bases.get(s.index, 0)
            expected = self.world.drafts(s.tokens, n, base) if n and len(s.tokens) - 1 > base else []
            assert d.tokens == expected, f"sequence {s.index} at {s.cached}"
            self.compared += bool(expected)
        return drafts


class Accepting:
    """Accepts a random number of drafts, then a random token, which for the cache is like a model."""

    def __init__(self, vocab: int) -> None:
        self.random, self.vocab = np.random.default_rng(0), vocab

    def accept(self, index, draft, logits, used=None):
        assert len(logits) == len(draft.tokens) + 1
        held = self.random.integers(len(draft.tokens) + 1)
        return [*draft.tokens[:held], int(self.random.integers(self.vocab))]


class Script:
    """A controller that returns the given numbers of drafts."""

    drafted_rounds = 2

    def __init__(self, chosen: list[int]) -> None:
        self.chosen = list(chosen)

    def choose(self, sequences, max_drafts=None):
        return min(self.chosen.pop(0), max_drafts)

    def record(self, seconds, outcomes, rounds=1, follows=False):
        pass


def decoder_of(
    world: World, chosen: list[int], bases: dict[int, int] | None = None, decodes: bool = False
) -> SpeculativeDecoder:
    arena = world.arena()
    layers = [Runner(plan, arena, 211 if decodes else 0, decodes=decodes) for plan in world.plans[1:]]
    proposer = Watched(world, layers, bases or {})
    return SpeculativeDecoder(Runner(world.plans[0], arena), proposer, Accepting(211), Script(chosen))


def begin(decoder: SpeculativeDecoder, index: int, ids: list[int], *, seen_from: int = 0, chunk: int = 1000) -> Sequence:
    """A sequence whose prompt is in the cache, and whose states from a token on are known to the proposer."""
    runner = decoder.runner
    sequence = Sequence(index, ids, runner_blocks(runner), first_position=3)
    for start in range(0, len(ids) - 1, chunk):
        part = Part(sequence, ids[start : min(start + chunk, len(ids) - 1)], start)
        runner.reserve([sequence], [len(part.ids)])
        states = runner.verify([part], draft_states=True).draft_states
        if start >= seen_from:
            decoder.proposer.follow(sequence, states)
    return sequence


def runner_blocks(runner: Runner) -> Any:
    from deepseek_optimizer.cache import SequenceBlocks

    return SequenceBlocks(runner.memory.manager)


WORLDS = {"one": (1, deepseek_v3), "two": (2, deepseek_v3), "three": (3, deepseek_v3), "one of keys per head": (1, llama)}


@pytest.fixture(scope="module", params=WORLDS)
def world(request) -> World:
    return World.make(*WORLDS[request.param])


@pytest.mark.parametrize("decodes", [False, True])
def test_drafts_equal_the_definition(world, decodes):
    """Sequences of different lengths, drafts accepted and rejected at random, with rounds without drafts."""
    chosen = [3, 1, 0, 4, 2, 0, 0, 3, 1, 5, 2]
    decoder = decoder_of(world, chosen, decodes=decodes)
    ids = random_ids(world.config, 60)
    sequences = [begin(decoder, 0, ids[:40]), begin(decoder, 7, ids[40:43]), begin(decoder, 3, ids[43:45])]
    for _ in range(len(chosen)):
        decoder.round(sequences, [9, 6, 3])
        assert all(s.cached == len(s.tokens) - 1 for s in sequences)
    assert decoder.proposer.compared == 3 * sum(n > 0 for n in chosen)
    decoder.runner.crop(sequences, [0] * 3)
    assert decoder.runner.memory.manager.free_blocks == 64


def test_sequences_leave_and_limits_differ(world):
    decoder = decoder_of(world, [3] * 6)
    ids = random_ids(world.config, 60)
    sequences = [begin(decoder, i, ids[20 * i : 20 * i + 5 + 7 * i]) for i in range(3)]
    decoder.round(sequences, [1, 2, 4])
    decoder.round(sequences, [9, 1, 9])
    for _ in range(4):
        decoder.round(sequences[1:], [2, 9])


def test_pending_states_are_processed_in_time(world, monkeypatch):
    """Chunks of a prompt, and many rounds without drafts: drafts still equal the definition."""
    monkeypatch.setattr(mtp, "_FLUSH", 8)
    chosen = [2, *[0] * 20, 3, 1, *[0] * 9, 2]
    decoder = decoder_of(world, chosen)
    sequence = begin(decoder, 0, random_ids(world.config, 70), chunk=9)
    for _ in range(len(chosen)):
        decoder.round([sequence], [9])
        track = decoder.proposer._tracks[0]
        assert sum(len(t) for t in track.waiting[0]) <= 8
    assert decoder.proposer.compared == 4


def test_texts_without_drafts_for_long_begin_anew(world, monkeypatch):
    """The layers then attend to the newest rows only."""
    chosen = [2, *[0] * 101, 3, 1, *[0] * 70, 2]
    decoder = decoder_of(world, chosen)
    sequence = begin(decoder, 0, random_ids(world.config, 30))
    for n in range(len(chosen)):
        if n == 102:
            seen = len(sequence.tokens) - 1
            decoder.proposer.bases[0] = -(-(seen - 64) // 32) * 32
            assert decoder.proposer.bases[0] > 32
        decoder.round([sequence], [9])
    assert decoder.proposer._tracks[0].base == decoder.proposer.bases[0]
    assert decoder.proposer.compared == 4


def test_a_prefix_without_states(world):
    """The layers then have rows from the next block on, and draft nothing before."""
    decoder = decoder_of(world, [3] * 30, {0: 64})
    sequence = begin(decoder, 0, random_ids(world.config, 50), seen_from=40, chunk=40)
    for _ in range(30):
        decoder.round([sequence], [9])
    assert decoder.proposer.compared > 5


def test_a_fork_continues_independently(world):
    decoder = decoder_of(world, [3] * 8)
    ids = random_ids(world.config, 40)
    one = begin(decoder, 0, ids)
    twin = Sequence(1, list(one.tokens), one.blocks.fork(), one.first_position)
    decoder.proposer.fork(one, twin)
    for _ in range(8):
        decoder.round([one, twin], [9, 9])
    assert one.tokens != twin.tokens
    assert decoder.proposer.compared == 16


@pytest.mark.parametrize("full", [False, True], ids=["", "in a full cache"])
@pytest.mark.parametrize("base", [0, 64])
def test_rounds_in_calls_are_single_rounds(world, base, full, monkeypatch):
    """With one layer; the text and the state of the proposer after each call are those of rounds run step by step."""
    texts, made = [], []
    for in_calls in (False, True):
        chosen = [3, 1, 0, 4, *[0] * 6, 3, 2]
        decoder = decoder_of(world, chosen, {0: base}, decodes=True)
        decoder.sampler = TorchSampler(sampled=False)
        if in_calls:
            call = lambda rounds, drafts, room: (  # noqa: E731
                made.append(drafts) or DraftedCall(rounds, drafts, room, RowChoice(), np.zeros(0, np.int32), 60.0)
            )
            decoder._drafted = DraftedRoundCalls(decoder.runner, decoder.proposer, call, decoder.sampler.choose)
        sequence = begin(decoder, 0, random_ids(world.config, 70), seen_from=base and 40, chunk=40)
        if in_calls and full:
            monkeypatch.setattr(decoder.runner, "reserve", full_for_many(decoder.runner.reserve))
        for _ in chosen:
            decoder.round([sequence], [9])
            track = decoder.proposer._tracks[0]
            assert track.seen == sequence.cached and sum(map(len, track.waiting[0])) == track.seen - track.done[0]
        texts.append(sequence.tokens)
    count = min(map(len, texts))
    assert texts[0][:count] == texts[1][:count] and count > 80
    assert bool(made) == (len(world.plans) == 2 and not full)


def full_for_many(reserve):
    """`Runner.reserve` in a cache that has room for a few tokens, not for those of a call."""

    def limited(sequences, counts, *, undo=False):
        if not undo and max(counts) > 1:
            raise CacheFullError(max(counts), 1)
        reserve(sequences, counts, undo=undo)

    return limited


def test_no_states_no_drafts(world):
    decoder = decoder_of(world, [3], {0: 1000})
    sequence = begin(decoder, 0, random_ids(world.config, 20), seen_from=1000)
    assert len(decoder.round([sequence], [9])[0]) == 1


def test_rows_of():
    parts = [Part(None, [1, 2], 0), Part(None, [3], 0), Part(None, [4, 5, 6], 0)]
    assert [r.tolist() for r in rows_of(np.arange(6), parts)] == [[0, 1], [2], [3, 4, 5]]
