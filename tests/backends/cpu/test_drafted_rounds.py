"""`Plan.decode_drafted`: native calls of several rounds against rounds run step by step, and both against plain decoding."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
import torch

from deepseek_optimizer.backends.base import DECODE, StepBatch
from deepseek_optimizer.backends.decoding import DraftedCall, RowChoice, TokenPenalties
from deepseek_optimizer.backends.drafted_round import drafted_round
from deepseek_optimizer.backends.sampling import TokenChoice
from deepseek_optimizer.models import build_graph, build_mtp_graph
from deepseek_optimizer.models.mtp import with_draft_vocabulary
from support.family_configs import deepseek_v3, llama
from support.models import random_model, random_weights, weights_of

from .packing import packed_weights

FAMILIES = {"llama": llama, "v3": deepseek_v3}
BLOCKS, PROMPT = 6, 71
LIKELY = 3  # tokens that most logits choose from, so that some drafts hold
NO_STOPS = np.zeros(0, np.int32)
SAMPLED = TokenChoice(temperature=1.2, top_k=3)


def ints(*values: int) -> Any:
    return np.array(values, np.int32)


@dataclass
class Text:
    """A sequence, and what the drafting plan has not processed of it. Its first blocks may be hidden from that plan.

    Attributes:
        states: of the tokens from `begin` on.
    """

    world: World
    store: Any
    tokens: list[int]
    states: torch.Tensor
    begin: int
    base: int

    def batches(self) -> tuple[StepBatch, StepBatch]:
        cached, table = len(self.tokens) - 1, np.arange(BLOCKS, dtype=np.int32)[None]
        common = {"phase": ints(DECODE), "draft_states": True}
        batch = StepBatch(
            ints(self.tokens[-1]), ints(cached), ints(1), ints(cached), block_table=table, logit_rows=ints(0), **common
        )
        rows = np.arange(self.begin, cached, dtype=np.int32)
        pending = StepBatch(
            ints(*self.tokens[self.begin + 1 :]), rows, ints(len(rows)), ints(self.begin - self.base),
            block_table=table[:, self.base // 32 :], logit_rows=ints(len(rows) - 1), states=self.states, **common,
        )  # fmt: skip
        return batch, pending

    def add(self, tokens: list[int], states: torch.Tensor) -> None:
        self.tokens += tokens
        self.states, self.begin = states, len(self.tokens) - 1 - len(states)


@dataclass
class World:
    """A model and a plan that drafts for it; `token_of` is its draft vocabulary."""

    backend: Any
    graph: Any
    plan: Any
    drafter: Any
    vocab: int
    token_of: Any = field(default=None)

    def text(self, base: int = 0, pending: int = 5) -> Text:
        """The prompt's tokens, of which the drafting plan has processed all from `base` on but the `pending` last ones."""
        store = self.backend.new_store(self.graph, "fp32", BLOCKS)
        text = Text(self, store, random_ids_of(self.vocab, PROMPT), torch.empty(0), 0, base)
        batch, _ = text.batches()
        rows = np.arange(PROMPT - 1, dtype=np.int32)
        prompt = replace(
            batch, token_ids=ints(*text.tokens[:-1]), positions=rows, query_len=ints(len(rows)), context_len=ints(0),
            logit_rows=ints(),
        )  # fmt: skip
        states = self.plan.run(prompt, store).draft_states
        text.begin, text.states = base, states[base:]
        if (done := PROMPT - 1 - pending) > base:
            _, first = text.batches()
            count = done - base
            self.drafter.run(
                replace(
                    first, token_ids=first.token_ids[:count], positions=first.positions[:count], query_len=ints(count),
                    logit_rows=ints(), states=states[base:done],
                ),
                store,
            )  # fmt: skip
            text.begin, text.states = done, states[done:]
        return text

    def call(self, **fields: Any) -> DraftedCall:
        given = {"rounds": 9, "drafts": 3, "room": 40, "row": RowChoice(), "stops": NO_STOPS, "seconds": 60.0}
        return DraftedCall(**{**given, "token_of": self.token_of, **fields})


def random_ids_of(vocab: int, count: int) -> list[int]:
    return torch.randint(0, vocab, (count,), generator=torch.Generator().manual_seed(0)).tolist()


def world_of(backend: Any, family: str, vocabulary: bool) -> World:
    config = FAMILIES[family](num_nextn_predict_layers=1)
    model = random_model(config)
    with torch.no_grad():
        model.lm_head.weight[LIKELY:] *= 0.01
    graph, drafting = build_graph(config, 1), build_mtp_graph(config, 0)
    token_of = None
    if vocabulary:
        token_of = np.array([0, 1, 2, *range(5, 90, 5)], np.int32)
        drafting = with_draft_vocabulary(drafting, len(token_of))
    weights = random_weights(drafting, 1)
    head = next(node.weights[0] for node in drafting.nodes if node.op == "lm_head")
    weights[head][LIKELY:] *= 0.01
    weights[head][:LIKELY] *= 6
    plans = [backend.compile(g, packed_weights(w, "fp32")) for g, w in ((graph, weights_of(model)), (drafting, weights))]
    return World(backend, graph, *plans, config.vocab_size, token_of)


@pytest.fixture(params=[(family, vocabulary) for family in FAMILIES for vocabulary in (False, True)], ids=str)
def world(backend, request) -> World:
    return world_of(backend, *request.param)


def by_single_rounds(text: Text, call: DraftedCall) -> list[Any]:
    """The rounds of a call by the definition, one after the other."""
    rounds, total = [], 0
    while len(rounds) < call.rounds and call.room - total > 1:
        row = call.row if call.row.numbers is None else call.row._replace(numbers=call.row.numbers[total:])
        batch, pending = text.batches()
        one = replace(call, row=row, room=call.room - total)
        made = drafted_round(text.world.plan, batch, text.world.drafter, pending, text.store, one)
        assert made.logits is None
        rounds += made.rounds
        total += len(made.rounds[0].tokens)
        text.add(made.rounds[0].tokens, made.draft_states)
        if made.rounds[0].tokens[-1] in call.stops:
            break
    return rounds


CALLS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "one draft": {"drafts": 1, "rounds": 20},
    "room": {"room": 14},
    "two tokens of room": {"room": 2},
    "only certain drafts": {"least": 0.7, "drafts": 5},
    "sampled": {"row": RowChoice(SAMPLED, np.random.default_rng(0).random(40))},
    "stop": {"stops": ints(1, 7)},
}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("base", [0, 64])
def test_a_call_equals_single_rounds(world, name, base):
    call, text, expected = world.call(**CALLS[name]), world.text(base), world.text(base)
    rounds = by_single_rounds(expected, call)
    made = world.plan.decode_drafted(*interleaved(text, world.drafter), text.store, call)
    assert [(r.tokens, r.drafted) for r in made.rounds] == [(r.tokens, r.drafted) for r in rounds]
    assert made.logits is None and all(r.seconds > 0 for r in made.rounds)
    torch.testing.assert_close(made.draft_states, expected.states, rtol=1e-4, atol=1e-4)
    counts = {len(r.tokens) - 1 for r in rounds}
    assert counts > {0} or name in ("two tokens of room", "stop")  # some drafts hold, and some do not
    if name == "only certain drafts":
        assert min(r.drafted for r in rounds) < 5  # no limit but this one


def interleaved(text: Text, drafter: Any) -> tuple[Any, Any, Any]:
    batch, pending = text.batches()
    return batch, drafter, pending


@pytest.mark.parametrize("kind", ["any", "penalized", "barred"])
def test_tokens_are_those_of_plain_decoding(world, kind):
    text, plain = world.text(), world.text()
    penalties = TokenPenalties(ints(*text.tokens), 0, repetition=1.3) if kind == "penalized" else None
    barred = ints(0, 2) if kind == "barred" else None
    call = world.call(row=RowChoice(penalties=penalties, barred=barred, barred_steps=3), rounds=6)
    made = world.plan.decode_drafted(*interleaved(text, world.drafter), text.store, call)
    tokens = [token for r in made.rounds for token in r.tokens]
    for place, token in enumerate(tokens):
        batch, _ = plain.batches()
        output = world.plan.run(batch, plain.store)
        logits = output.logits[0]
        if kind == "penalized":
            seen = torch.tensor(sorted(set(plain.tokens)))
            logits[seen] = torch.where(logits[seen] > 0, logits[seen] / 1.3, logits[seen] * 1.3)
        if kind == "barred" and place < 3:
            logits[[0, 2]] = -torch.inf
        assert int(logits.argmax()) == token
        plain.add([token], output.draft_states)
    assert len(tokens) > 6


def test_the_caller_chooses_where_a_choice_is_not_certain(world):
    """A number at the border between two tokens."""
    text = world.text()
    batch, pending = text.batches()
    probabilities = (world.plan.run(batch, text.store).logits[0].double() / 1.2).softmax(-1)
    number = float(probabilities[:1].sum())
    row = RowChoice(TokenChoice(temperature=1.2), np.array([number] * 40))
    made = world.plan.decode_drafted(batch, world.drafter, pending, text.store, world.call(row=row))
    assert [r.tokens for r in made.rounds] == [[]]
    torch.testing.assert_close((made.logits.double() / 1.2).softmax(-1), probabilities)
    assert made.draft_states.shape == (1, world.plan.hidden_size)


def test_no_round_begins_after_the_time(world):
    text = world.text()
    made = world.plan.decode_drafted(*interleaved(text, world.drafter), text.store, world.call(seconds=0.0))
    assert len(made.rounds) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rounds": 0}, "rounds is 0"), ({"drafts": 0}, "drafts is 0"), ({"room": 1}, "room is 1"), ({"least": 1.5}, "least"),
        ({"room": 200}, "batch.max_blocks is 6"),
    ],
)  # fmt: skip
def test_invalid_calls_are_refused(backend, change, message):
    world = world_of(backend, "llama", False)
    text = world.text()
    with pytest.raises(ValueError, match=message):
        world.plan.decode_drafted(*interleaved(text, world.drafter), text.store, world.call(**{"rounds": 80, **change}))


def test_pending_rows_must_end_before_the_models(backend):
    world = world_of(backend, "llama", False)
    text = world.text()
    batch, pending = text.batches()
    with pytest.raises(ValueError, match="pending has rows up to 71"):
        pending.context_len = pending.context_len + 1
        world.plan.decode_drafted(batch, world.drafter, pending, text.store, world.call())
