"""Decoding with layers that are divided among threads, which stand for processes, equals decoding with the whole plan."""

from __future__ import annotations

import math
import socket
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch

from deepseek_optimizer.backends import cpu
from deepseek_optimizer.backends.base import DECODE
from deepseek_optimizer.backends.decoding import DecodeCall, RowChoice, TokenPenalties
from deepseek_optimizer.backends.reference.ranks import StagePlans
from deepseek_optimizer.backends.sampling import TokenChoice
from deepseek_optimizer.backends.stage_batch import layer_batch, tail_batch
from deepseek_optimizer.errors import RankLostError
from deepseek_optimizer.graph import rules
from deepseek_optimizer.graph.parallel.pipeline import split_layers
from deepseek_optimizer.models import build_graph
from support.models import CASES, random_ids, random_model, weights_of
from support.steps import Part, make_batch, runner

from .packing import packed_weights

STEPS, VOCAB = 9, 211
WARM = TokenChoice(temperature=1.4, top_k=20, top_p=0.9, min_p=0.0, u=0.0)


def choices(kind):
    """Of two sequences."""
    generator, barred = np.random.default_rng(2), np.arange(0, VOCAB, 2, dtype=np.int32)
    noise = torch.empty(2, STEPS, VOCAB).exponential_(generator=torch.Generator().manual_seed(3))
    penalties = TokenPenalties(np.array([3, 4], np.int32), 2, repetition=1.3)
    return {
        "largest": [RowChoice()] * 2,
        "numbers": [RowChoice(WARM, numbers=generator.random(STEPS)) for _ in range(2)],
        "noise": [RowChoice(WARM, noise=row) for row in noise],
        "variates": [RowChoice(WARM, variate=VOCAB * n) for n in range(2)],
        "barred": [RowChoice(barred=barred, barred_steps=4), RowChoice(WARM, numbers=generator.random(STEPS))],
        "penalties": [RowChoice(penalties=penalties), RowChoice()],
    }[kind]


def generator_state():
    """A state of `DecodeCall.generator`."""
    state = torch.Generator().manual_seed(11).get_state().numpy()
    words = state[24 : 24 + 4 * 2 * 624].view(np.uint32)[::2]
    return np.concatenate([np.array([1, 0], np.uint32), words]).astype(np.uint32)


def lost(link):
    raise RankLostError(f"link {link}")


class Divided:
    """The plans of two or more stages, each on a backend of its own, and sockets between the first one and the others.

    absent: a rank that has ended, 0: none. gone: whether the first one has ended for the others.
    """

    def __init__(self, isa, graph, weights, ranks, absent, gone):
        self.absent, self.gone = absent, gone
        backends = [cpu.CpuBackend(isa=cpu.exact(isa), threads=1 + rank % 2) for rank in range(ranks)]
        self.stages = split_layers(graph, ranks, lambda _: 1)
        self.plans = [backend.compile(stage.graph, weights) for backend, stage in zip(backends, self.stages, strict=True)]
        self.stores = [b.new_store(stage.graph, "fp32", 16) for b, stage in zip(backends, self.stages, strict=True)]
        self.tail = backends[0].compile(self.stages[0].tail, weights)
        self.links = [socket.socketpair() for _ in self.stages[1:]]
        self.pool = ThreadPoolExecutor(ranks)
        self.following = []

    def run(self, batch):
        return StagePlans(self.plans, self.tail, [stage.groups for stage in self.stages]).run(batch, self.stores)

    def layers(self, batch, rank):
        return layer_batch(replace(batch, logits=None), self.stages[rank].groups, None)

    def follow(self, batch, rank):
        self.plans[rank].follow(self.layers(batch, rank), self.stores[rank], self.links[rank - 1][1].fileno())

    def start(self, batch):
        if self.absent:
            self.links[self.absent - 1][1].close()
        if self.gone:
            self.links[0][0].shutdown(socket.SHUT_RDWR)
        present = [rank for rank in range(1, len(self.stages)) if rank != self.absent]
        self.following = [self.pool.submit(self.follow, batch, rank) for rank in present]
        return [here.fileno() for here, _ in self.links]

    def decode(self, batch, call):
        own = self.layers(batch, 0)
        try:
            return self.tail.decode_after(
                tail_batch(batch, None), call, self.plans[0], own, self.stores[0], lambda: self.start(batch), lost
            )
        finally:
            for other in self.following:
                other.result(60)

    def close(self):
        for link in self.links:
            for end in link:
                end.close()
        self.pool.shutdown()


@pytest.fixture
def decode(backend, isa):
    """Runs a call after two prompts, with the whole plan (1) or many stages. Returns the result and the generator's state."""
    model = random_model(CASES["llama-gqa"]())
    graph, _ = rules.apply(build_graph(model.config), None)
    weights = packed_weights(weights_of(model), "fp32")
    opened = []

    def run(ranks, rows, steps=STEPS, stops=(), seconds=math.inf, first=7, tokens=1, absent=0, gone=False, **more):
        whole = runner(backend, graph, weights, blocks=16)
        divided = None if ranks == 1 else Divided(isa, graph, weights, ranks, absent, gone)
        opened.extend([] if divided is None else [divided])
        blocks = [whole.sequence(), whole.sequence()]
        for n, sequence in enumerate(blocks):
            batch = make_batch([Part(sequence, random_ids(model.config, 5 + n, seed=n))], whole.store)
            divided.run(batch) if divided else whole.plan.run(batch, whole.store)
        batch = make_batch([Part(sequence, [first] * tokens, DECODE) for sequence in blocks], whole.store)
        batch.inputs_embeds = more.pop("inputs_embeds", None)
        batch.draft_states = more.pop("draft_states", False)
        generator = generator_state() if rows[0].variate is not None else None
        call = DecodeCall(steps, rows, np.array(stops, np.int32), seconds, generator, 2 * VOCAB, **more)
        return (divided.decode(batch, call) if divided else whole.plan.decode(batch, whole.store, call)), generator

    run.opened = opened
    yield run
    for divided in opened:
        divided.close()


@pytest.mark.parametrize("kind", ["largest", "numbers", "noise", "variates", "barred", "penalties"])
@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize("ranks", [2, 3])
def test_equals_the_whole_plan(decode, kind, mapped, ranks):
    if mapped and kind == "penalties":
        pytest.skip("refused by every plan")
    token_of = np.random.default_rng(5).permutation(VOCAB).astype(np.int32) if mapped else None
    (expected, after), (actual, state) = (decode(n, choices(kind), token_of=token_of) for n in (1, ranks))
    assert len(expected.tokens) == STEPS and expected.logits is None and actual.logits is None
    assert actual.tokens.tolist() == expected.tokens.tolist()
    assert (state is None) == (kind != "variates") and (state is None or (state == after).all())


@pytest.mark.parametrize("more", [{"keep_logits": True}, {"draft_states": True}], ids=["logits", "draft states"])
def test_the_results_of_each_step(decode, more):
    (expected, _), (actual, _) = (decode(ranks, choices("numbers"), **more) for ranks in (1, 2))
    assert actual.tokens.tolist() == expected.tokens.tolist()
    for name in ("kept_logits", "draft_states"):
        one, other = getattr(expected, name), getattr(actual, name)
        assert (one is None) == (other is None) and (one is None or torch.equal(one, other))
    assert len(actual.kept_logits if "keep_logits" in more else actual.draft_states) == STEPS


@pytest.mark.parametrize("place", range(4))
def test_a_stop_ends_it(decode, place):
    chosen = decode(1, choices("numbers"))[0].tokens
    stop = chosen[place, 1]
    actual = decode(2, choices("numbers"), stops=[stop])[0].tokens.tolist()
    assert actual == chosen[: len(actual)].tolist()
    assert len(actual) == 1 + next(n for n, row in enumerate(chosen.tolist()) if stop in row)


def test_no_further_step_begins_after_the_time(decode):
    assert len(decode(2, choices("largest"), seconds=0.0)[0].tokens) == 1


def test_an_undecided_step_is_returned_after_the_tokens_before_it(decode):
    """The caller must choose the tokens of a step with variates that are not positive."""
    rows = choices("noise")
    rows[1].noise[3] = 0
    (expected, _), (actual, _) = (decode(ranks, rows) for ranks in (1, 2))
    assert expected.logits is not None and torch.equal(actual.logits, expected.logits)
    assert actual.tokens.tolist() == expected.tokens.tolist() and len(actual.tokens) == 3


def test_a_failed_step_ends_the_others_without_an_error(decode):
    with pytest.raises(ValueError, match=r"token_ids\[0\]"):
        decode(3, choices("largest"), first=VOCAB)
    assert [other.exception() for other in decode.opened[0].following] == [None, None]


def test_invalid_arguments_start_nothing(decode):
    with pytest.raises(ValueError, match="rows must be 2 choices"):
        decode(2, choices("largest")[:1])
    with pytest.raises(ValueError, match="one token of each sequence, and no inputs_embeds"):
        decode(2, choices("largest"), tokens=2)
    with pytest.raises(ValueError, match="one token of each sequence, and no inputs_embeds"):
        decode(2, choices("largest"), inputs_embeds=torch.zeros(2, 64))
    assert [divided.following for divided in decode.opened] == [[], [], []]


@pytest.mark.parametrize("absent", [1, 2])
def test_a_lost_process_is_named(decode, absent):
    """The others end their steps without an error."""
    with pytest.raises(RankLostError, match=f"link {absent - 1}"):
        decode(3, choices("largest"), absent=absent)
    assert [other.exception() for other in decode.opened[0].following] == [None]


def test_a_process_notices_that_the_first_one_is_gone(decode):
    with pytest.raises(RankLostError, match="the first process"):
        decode(2, choices("largest"), gone=True)
