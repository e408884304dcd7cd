"""Rows of pictures in a step: positions on three axes, features, tokens that see later ones; native against the reference."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from deepseek_optimizer.backends.base import DECODE, PREFILL, StepBatch
from deepseek_optimizer.backends.cpu import CpuBackend, unavailable_reason
from deepseek_optimizer.backends.reference import ReferenceBackend
from deepseek_optimizer.errors import BackendError
from deepseek_optimizer.graph import rules
from deepseek_optimizer.graph.cache_groups import cached_in
from deepseek_optimizer.graph.ir import Graph, Node, Value
from deepseek_optimizer.models import build_graph
from support.family_configs import gemma2, llama
from support.models import assert_close_rows, random_model, weights_of
from support.steps import Part, Runner, make_batch, runner

from .cpu.packing import packed_weights

CONTEXT, ROWS = 37, 90
TOLERANCE = {"fp32": 1e-5, "bf16": 1e-5, "int8": 1e-5, "int4": 1e-4}
BF16_PRODUCTS = 0.03  # where attention over rounded entries multiplies in bf16, with pictures and without


def native() -> CpuBackend:
    if (reason := unavailable_reason()) is not None:
        pytest.skip(reason)
    return CpuBackend(threads=2)


def graph_of(config: Any, rule_names: Any = None, features: int = 2) -> Graph:
    """A graph whose RoPE has axes, and that adds features after its first layers."""
    graph = build_graph(config)
    nodes: list[Node] = []
    for node in graph.nodes:
        if node.op == "rope_table":
            rope = node.attrs["rope"]
            node = node.with_(attrs={"rope": replace(rope, axes=tuple(i % 3 for i in range(len(rope.inv_freq))))})
        nodes.append(node)
    last = max(node.attrs["layer"] for node in nodes if node.op == "attention")  # which is causal
    nodes = [
        node.with_(attrs={**node.attrs, "causal": True}) if node.op == "attention" and node.attrs["layer"] == last else node
        for node in nodes
    ]
    renamed: dict[Value, Value] = {}
    with_features: list[Node] = []
    for node in nodes:
        node = node.with_(inputs=tuple(renamed.get(value, value) for value in node.inputs))
        with_features.append(node)
        index = next((i for i in range(features) if node.outputs and node.outputs[0].name == f"l{i}.out"), None)
        if index is not None:
            (value,) = node.outputs
            renamed[value] = seen = replace(value, name=f"{value.name}.seen")
            with_features.append(Node("add_features", (value,), (seen,), attrs={"index": index}))
    return rules.apply(replace(graph, nodes=with_features), rule_names)[0]


def pictures_of(graph: Graph, tokens: int, seed: int = 0) -> dict[str, Any]:
    """Fields of a step whose rows have odd positions and features; rows 10 to 29 and 41 to 80 of each sequence are pictures."""
    generator = np.random.default_rng(seed)
    features = torch.from_numpy(generator.standard_normal((graph.features, tokens, graph.hidden_size), np.float32))
    return {"axes": generator.integers(0, 100, (tokens, 3)).astype(np.int32), "features": features}


def ends_of(contexts: list[int], counts: list[int]) -> np.ndarray:
    ends = []
    for context, count in zip(contexts, counts, strict=True):
        own = np.arange(1, count + 1)
        for begin, end in ((10, 29), (41, 80)):
            own[begin : min(end, count)] = min(end, count)
        ends.append(own + context)
    return np.concatenate(ends).astype(np.int32)


def outputs(r: Runner, graph: Graph, vocab: int, phase: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of a step with two sequences, one of which has earlier tokens, and then of a step without pictures."""
    generator = np.random.default_rng(1)
    sequences = [r.sequence(), r.sequence()]
    first = generator.integers(0, vocab, CONTEXT).tolist()
    r.plan.run(make_batch([Part(sequences[0], first)], r.store), r.store)
    ids = [generator.integers(0, vocab, n).tolist() for n in (ROWS, ROWS - 21)]
    parts = [Part(s, row, phase) for s, row in zip(sequences, ids, strict=True)]
    tokens = sum(map(len, ids))
    visible_to = ends_of([CONTEXT, 0], [len(row) for row in ids])
    step = make_batch(parts, r.store, visible_to=visible_to, **pictures_of(graph, tokens))
    with_pictures = r.plan.run(step, r.store).logits.clone()
    then = r.plan.run(make_batch([Part(s, [5], DECODE) for s in sequences], r.store), r.store).logits
    return with_pictures, then


@pytest.mark.parametrize("phase", [PREFILL, DECODE], ids=["prefill", "decode"])
@pytest.mark.parametrize("kv", TOLERANCE)
@pytest.mark.parametrize("case", ["eager", "online", "windows"])
def test_native_equals_the_reference(case, kv, phase):
    config = gemma2(sliding_window=33) if case == "windows" else llama(num_hidden_layers=3)
    names = tuple(rules.RULES) if case != "eager" else tuple(name for name in rules.RULES if name != "attention_softmax")
    graph = cached_in(graph_of(config, names), kv)
    weights = packed_weights(weights_of(random_model(config)), "fp32")
    vocab = graph.vocab_size
    rounded = kv != "fp32" and native().isa in ("avx512-bf16", "amx", "amx-emulated", "neon-i8mm")
    tolerance = BF16_PRODUCTS if rounded else 2e-3 if kv == "bf16" else TOLERANCE[kv]
    ours = outputs(runner(native(), graph, weights, kv=kv), graph, vocab, phase)
    theirs = outputs(runner(ReferenceBackend(), graph, weights, kv=kv), graph, vocab, phase)
    for actual, expected in zip(ours, theirs, strict=True):
        assert_close_rows(actual, expected, tolerance)


@pytest.mark.parametrize("name", ["reference", "cpu"])
def test_rows_without_pictures_keep_their_bits(name):
    """Positions on the axes that are equal, features of zero and ends that are the rows' own change nothing."""
    config = llama(num_hidden_layers=2)
    graph, weights = graph_of(config), packed_weights(weights_of(random_model(config)), "fp32")
    r = runner(native() if name == "cpu" else ReferenceBackend(), graph, weights)
    ids = list(range(3, 60))
    plain = r.plan.run(make_batch([Part(r.sequence(), ids)], r.store), r.store).logits.clone()
    own = np.arange(len(ids), dtype=np.int32)
    more = {
        "axes": np.repeat(own[:, None], 3, 1),
        "visible_to": own + 1,
        "features": torch.zeros(graph.features, len(ids), graph.hidden_size),
    }
    assert torch.equal(r.plan.run(make_batch([Part(r.sequence(), ids)], r.store, **more), r.store).logits, plain)


@pytest.mark.parametrize("name", ["reference", "cpu"])
@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("axes", np.zeros((4, 2), np.int32)),
        ("features", torch.zeros(1, 4, 8)),
        ("visible_to", np.array([1, 2, 3], np.int32)),
        ("visible_to", np.array([1, 1, 3, 4], np.int32)),  # not its own token
        ("visible_to", np.array([1, 2, 3, 5], np.int32)),  # beyond the step
        ("visible_to", np.array([3, 2, 3, 4], np.int32)),  # descends
    ],
)
def test_invalid_fields(name, field, value):
    config = llama(num_hidden_layers=2)
    graph, weights = graph_of(config), packed_weights(weights_of(random_model(config)), "fp32")
    r = runner(native() if name == "cpu" else ReferenceBackend(), graph, weights)
    batch: StepBatch = make_batch([Part(r.sequence(), [1, 2, 3, 4])], r.store, **{field: value})
    with pytest.raises((BackendError, ValueError), match=field):
        r.plan.run(batch, r.store)
