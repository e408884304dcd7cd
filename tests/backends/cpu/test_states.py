"""`state_in`, `concat`, and the output of the last hidden state, in whole plans."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from deepseek_optimizer.backends.base import DECODE
from deepseek_optimizer.backends.decoding import DecodeCall, RowChoice
from deepseek_optimizer.backends.reference import ReferenceBackend
from deepseek_optimizer.graph import rules
from deepseek_optimizer.graph.ir import Graph, Node, Value
from deepseek_optimizer.models import build_graph
from support.models import CASES, assert_close_rows, random_ids, random_model, weights_of
from support.steps import Part, make_batch, runner

from .packing import dequantized, packed_weights

TOLERANCE = {"fp32": 1e-5, "bf16": 2e-2, "int8": 1e-3, "int4": 6e-2}  # see test_families


def with_states(graph: Graph, weight: str) -> Graph:
    """The graph with [embedding, state] W instead of the embedding, like the beginning of an MTP layer."""
    embedding = graph.nodes[0]
    x = embedding.outputs[0]
    first, state, both = Value("first", x.width), Value("state", x.width), Value("both", 2 * x.width)
    graph.nodes[:1] = [
        embedding.with_(outputs=(first,)),
        Node("state_in", (), (state,)),
        Node("concat", (first, state), (both,)),
        Node("linear", (both,), (x,), (weight,), {"biases": (None,)}),
    ]
    return graph


@pytest.mark.parametrize("format_name", TOLERANCE)
@pytest.mark.parametrize("fused", [False, True])
def test_states_against_the_reference(backend, format_name, fused):
    model = random_model(CASES["llama-gqa"]())
    hidden = model.config.hidden_size
    graph, _ = rules.apply(with_states(build_graph(model.config), "in.weight"), None if fused else [])
    generator = torch.Generator().manual_seed(1)
    weights = packed_weights(
        {**weights_of(model), "in.weight": torch.randn(hidden, 2 * hidden, generator=generator) / 12}, format_name
    )
    states = torch.randn(40, hidden, generator=generator)
    ids = random_ids(model.config, 40)
    made = []
    for r in (
        runner(backend, graph, weights),
        runner(ReferenceBackend(), graph, dequantized(weights)),
    ):
        blocks = r.sequence()
        batch = make_batch([Part(blocks, ids, DECODE)], r.store)
        batch.states, batch.last_hidden = states, True
        made.append(r.plan.run(batch, r.store))
    native, reference = made
    assert native.hidden is None
    assert_close_rows(native.logits, reference.logits, TOLERANCE[format_name])
    assert_close_rows(native.last_hidden, reference.last_hidden, TOLERANCE[format_name])


def test_last_hidden_is_the_last_hidden_state(backend):
    """With the head on some rows only, all rows have their state, and requesting states does not change logits."""
    model = random_model(CASES["qwen3-gqa"]())
    graph, _ = rules.apply(build_graph(model.config), None)
    r = runner(backend, graph, packed_weights(weights_of(model), "fp32"))
    ids, made = random_ids(model.config, 37), []
    for hidden, last in ((True, True), (False, True), (True, False), (False, False)):
        batch = make_batch([Part(r.sequence(), ids, DECODE, rows=[3, 36])], r.store, hidden=hidden)
        batch.last_hidden = last
        made.append(r.plan.run(batch, r.store))
    both, last, every, none = made
    assert torch.equal(last.last_hidden, both.last_hidden)
    assert torch.equal(last.last_hidden, every.hidden[-1])
    assert every.last_hidden is None
    assert none.hidden is None
    assert none.last_hidden is None
    assert all(torch.equal(m.logits, both.logits) for m in made)


def test_states_of_a_wrong_shape_are_rejected(backend):
    model = random_model(CASES["llama-gqa"]())
    graph, _ = rules.apply(with_states(build_graph(model.config), "in.weight"), None)
    hidden = model.config.hidden_size
    r = runner(backend, graph, packed_weights({**weights_of(model), "in.weight": torch.zeros(hidden, 2 * hidden)}, "fp32"))
    batch = make_batch([Part(r.sequence(), [1, 2], DECODE)], r.store)
    with pytest.raises(ValueError, match="batch.states is NULL"):
        r.plan.run(batch, r.store)
    batch.states = torch.zeros(3, hidden)
    with pytest.raises(ValueError, match="states must be contiguous"):
        r.plan.run(batch, r.store)


def several(plan, store, batch, states, steps, **call):
    """A call of `decode` over two sequences."""
    batch.states, batch.draft_states = states, True
    return plan.decode(batch, store, DecodeCall(steps, [RowChoice()] * 2, np.zeros(0, np.int32), math.inf, **call))


@pytest.mark.parametrize("token_of", [None, np.arange(211, dtype=np.int32)[::-1].copy()], ids=["all tokens", "other tokens"])
def test_a_call_of_several_steps_continues_with_its_own_states(backend, token_of):
    """Bit for bit the tokens and states of single steps, also from the reference's single-step calls."""
    model = random_model(CASES["llama-gqa"]())
    hidden, steps = model.config.hidden_size, 7
    graph = with_states(build_graph(model.config), "in.weight")
    generator = torch.Generator().manual_seed(1)
    weights = packed_weights(
        {**weights_of(model), "in.weight": torch.randn(hidden, 2 * hidden, generator=generator) / 12}, "fp32"
    )
    first = torch.randn(2, hidden, generator=generator)
    native, reference = runner(backend, graph, weights), runner(ReferenceBackend(), graph, dequantized(weights))
    for r, singly in ((native, False), (reference, True)):
        one, other = ([r.sequence(), r.sequence()] for _ in range(2))
        states, ids, expected = first, [3, 5], []
        for _ in range(steps):
            batch = make_batch([Part(blocks, [i], DECODE) for blocks, i in zip(one, ids, strict=True)], r.store)
            batch.states, batch.draft_states = states, True
            output = r.plan.run(batch, r.store)
            states, chosen = output.draft_states, output.logits.argmax(-1)
            ids = chosen.tolist() if token_of is None else token_of[chosen.numpy()].tolist()
            expected.append((ids, states))
        batch = make_batch([Part(blocks, [i], DECODE) for blocks, i in zip(other, [3, 5], strict=True)], r.store)
        for blocks in other:
            blocks.append(steps - 1)
        decoded = several(r.plan, r.store, batch, first, steps, token_of=token_of)
        count = 1 if singly else steps
        assert decoded.logits is None and decoded.steps == count
        assert decoded.tokens.tolist() == [tokens for tokens, _ in expected[:count]]
        assert torch.equal(decoded.draft_states, torch.stack([state for _, state in expected[:count]]))


def test_states_of_the_step_whose_tokens_are_left_to_the_caller(backend):
    model = random_model(CASES["llama-gqa"]())
    graph = build_graph(model.config)
    weights = packed_weights(weights_of(model), "fp32")
    weights["model.norm.weight"] = weights["model.norm.weight"] * float("nan")
    r = runner(backend, graph, weights)
    batch = make_batch([Part(r.sequence(), [3], DECODE), Part(r.sequence(), [5], DECODE)], r.store)
    decoded = several(r.plan, r.store, batch, None, 4)
    assert decoded.steps == 1 and len(decoded.tokens) == 0
    assert decoded.logits.isnan().all() and decoded.draft_states.shape == (1, 2, model.config.hidden_size)


def test_states_and_other_tokens_of_a_call_are_checked(backend):
    model = random_model(CASES["llama-gqa"]())
    r = runner(backend, build_graph(model.config), packed_weights(weights_of(model), "fp32"))
    batch = make_batch([Part(r.sequence(), [3], DECODE), Part(r.sequence(), [5], DECODE)], r.store)
    with pytest.raises(ValueError, match=r"token_of must be contiguous int32 \[211\]"):
        several(r.plan, r.store, batch, None, 4, token_of=np.zeros(3, np.int32))
