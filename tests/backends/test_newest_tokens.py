"""Int8 copies of the newest tokens of int4 caches: which tokens are read from them, and that releasing them changes no bit."""

from __future__ import annotations

import random
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

from deepseek_optimizer.backends.base import DECODE, PREFILL
from deepseek_optimizer.backends.cpu import CpuBackend, unavailable_reason
from deepseek_optimizer.backends.reference import ReferenceBackend
from deepseek_optimizer.cache import HOLE, Forgetting, Groups
from deepseek_optimizer.errors import BackendError
from deepseek_optimizer.graph import rules
from deepseek_optimizer.graph.attention_mode import FLASH, AttentionMode, apply_mode
from deepseek_optimizer.graph.cache_groups import NEWEST, cached_in, group_layers, group_spans
from deepseek_optimizer.graph.ir import Graph
from deepseek_optimizer.graph.rope_rotation import key_rotation
from deepseek_optimizer.integration.bind.runtime import groups_of
from deepseek_optimizer.models import build_graph
from support.family_configs import gemma2, llama, qwen2
from support.models import random_ids, random_model, weights_of
from support.steps import Part, Runner, run_step, runner

from .cpu.packing import packed_weights

BACKENDS = ["reference", "cpu"]
PHASES = pytest.mark.parametrize("phase", [PREFILL, DECODE], ids=["prefill", "decode"])
MODELS: dict[str, tuple[Any, AttentionMode]] = {
    "llama": (llama(num_hidden_layers=3), FLASH),
    "sliding": (llama(num_hidden_layers=2), AttentionMode("sliding", window=70, sinks=37)),
    "short window": (llama(num_hidden_layers=2), AttentionMode("sliding", window=20, sinks=40)),
    "two groups": (gemma2(sliding_window=50), FLASH),
}


def backend_of(name: str) -> Any:
    if name == "cpu" and (reason := unavailable_reason()) is not None:
        pytest.skip(reason)
    return CpuBackend(threads=2) if name == "cpu" else ReferenceBackend()


def plain_graph(config: Any, mode: AttentionMode = FLASH) -> Graph:
    return apply_mode(rules.apply(build_graph(config))[0], mode)[0]


def graph_of(config: Any, mode: AttentionMode = FLASH, newest: int = NEWEST) -> Graph:
    graph = cached_in(plain_graph(config, mode), "int4")
    return replace(graph, cache=replace(graph.cache, newest=newest))


def weights(model: Any) -> Any:
    return packed_weights(weights_of(model), "fp32")


def released(graph: Graph, spare: int) -> Groups:
    return tuple(None if f is None else replace(f, spare=spare) for f in groups_of(graph))


@PHASES
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["llama", "sliding", "two groups"])
def test_a_text_of_newest_tokens_has_the_bits_of_an_int8_cache(name: str, backend: str, phase: int) -> None:
    """On the reference apart from the order of sums. Sinks before a window are read in int4."""
    config, mode = MODELS[name]
    mode = replace(mode, sinks=0)
    model, made = random_model(config), backend_of(backend)
    ids = random_ids(config, 200)
    expected = runner(made, plain_graph(config, mode), weights(model), kv="int8").logits(ids, phase=phase)
    for newest, equal in ((200, True), (40, False)):
        actual = runner(made, graph_of(config, mode, newest), weights(model), kv="int4").logits(ids, (5, 90), phase)
        same = torch.equal if backend == "cpu" else partial(torch.allclose, rtol=0, atol=1e-4)
        assert same(actual, expected) == equal and same(actual[:40], expected[:40])


@PHASES
@pytest.mark.parametrize("newest", [1, 37, 64, 300])
@pytest.mark.parametrize("name", list(MODELS))
def test_native_plans_equal_the_reference(name: str, newest: int, phase: int) -> None:
    """On average: where a row is rounded to another code, its logits differ more, above all in Gemma 2's tiny model."""
    config, mode = MODELS[name]
    model, ids = random_model(config), random_ids(config, 330)
    graph = graph_of(config, mode, newest)
    expected = runner(ReferenceBackend(), graph, weights_of(model), kv="int4").logits(ids)
    actual = runner(backend_of("cpu"), graph, weights(model), kv="int4").logits(ids, (1, 70, 200), phase)
    error = (actual - expected).abs().amax(-1) / expected.abs().amax(-1)
    assert error.mean() <= (5e-2 if name == "two groups" else 1e-2)


def test_eager_attention_equals_the_reference() -> None:
    config = llama(num_hidden_layers=2)
    model, ids = random_model(config), random_ids(config, 150)
    graph = graph_of(config, newest=50)
    eager = replace(
        graph,
        nodes=[n.with_(attrs={**n.attrs, "softmax": "eager"}) if n.op == "attention" else n for n in graph.nodes],
    )
    expected = runner(ReferenceBackend(), eager, weights_of(model), kv="int4").logits(ids)
    actual = runner(backend_of("cpu"), eager, weights(model), kv="int4").logits(ids)
    error = (actual - expected).abs().amax(-1) / expected.abs().amax(-1)
    assert error.mean() <= 1e-2


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("name", list(MODELS))
@pytest.mark.parametrize("backend", BACKENDS)
def test_releasing_changes_no_bit(backend: str, name: str, seed: int) -> None:
    """Random chunks, batches, forks, rejected drafts and crops, over a cache that releases blocks and one that does not."""
    rng = random.Random(seed)
    config, mode = MODELS[name]
    made, model = backend_of(backend), random_model(config)
    graph = graph_of(config, mode, rng.choice((5, 32, 37, 64, 70)))
    plan = made.compile(graph, weights(model))
    groups = released(graph, rng.choice((0, 20, 40)))
    runners = [Runner(plan, made.new_store(graph, "int4", 150), g) for g in ((None,) * len(groups), groups)]
    live = [[r.sequence() for r in runners]]
    holes = 0
    for _ in range(14):
        if len(live) < 3 and rng.random() < 0.3:
            live.append([own.fork() for own in rng.choice(live)] if rng.random() < 0.6 else [r.sequence() for r in runners])
        phase, chosen = rng.choice((PREFILL, DECODE)), rng.sample(live, rng.randint(1, len(live)))
        ids = [[rng.randrange(graph.vocab_size) for _ in range(rng.choice((1, 40, 70) if phase else (1, 4)))] for _ in chosen]
        logits = [
            run_step(r.plan, r.store, [Part(own[n], new, phase) for own, new in zip(chosen, ids, strict=True)]).logits
            for n, r in enumerate(runners)
        ]
        assert torch.equal(*logits)
        for whole, own in chosen:
            drafts = rng.choice((0, 0, min(3, whole.tokens)))
            whole.crop(whole.tokens - drafts)
            own.crop(own.tokens - drafts)
            own.forget()
            holes += len(own.tables[-1].holes)
            if rng.random() < 0.1:
                target = own.nearest(rng.randrange(whole.tokens + 1))
                whole.crop(target)
                own.crop(target)
        runners[1].store.release(runners[1].manager.high_water)
    assert holes
    for both in live:
        for sequence in both:
            sequence.free()
    assert runners[1].manager.free_blocks == 150


@pytest.mark.parametrize("backend", BACKENDS)
def test_copies_are_rotated(backend: str) -> None:
    """Dropping blocks moves the newest tokens as it moves those of an int8 cache."""
    config = llama(num_hidden_layers=2)
    made, model, ids = backend_of(backend), random_model(config), random_ids(config, 161)
    logits = []
    for graph, kv in ((plain_graph(config), "int8"), (graph_of(config, newest=400), "int4")):
        r = runner(made, graph, weights(model), kv=kv)
        sequence = r.sequence()
        run_step(r.plan, r.store, [Part(sequence, ids[:160])])

        def move(_: Any, tables: list[list[int]], r: Runner = r, graph: Graph = graph) -> None:
            for group, blocks in enumerate(tables):
                r.store.rotate(key_rotation(graph), np.array(blocks, np.int32), 64, 96, -64, group)

        sequence.drop(1, 2, move)
        logits.append(run_step(r.plan, r.store, [Part(sequence, ids[160:], DECODE)]).logits)
    assert torch.allclose(*logits, rtol=0, atol=0 if backend == "cpu" else 1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_missing_copies_are_errors(backend: str) -> None:
    config = llama(num_hidden_layers=2)
    graph = graph_of(config, newest=64)
    made = backend_of(backend)
    r = Runner(made.compile(graph, weights(random_model(config))), made.new_store(graph, "int4", 40), released(graph, 0))
    sequence = r.sequence()
    run_step(r.plan, r.store, [Part(sequence, [1] * 200)])
    sequence.forget()
    assert sequence.tables[1].blocks[:4] == [HOLE] * 4 and HOLE not in sequence.tables[0].blocks
    assert run_step(r.plan, r.store, [Part(sequence, [1])]).logits.isfinite().all()
    sequence.tables[1].blocks[5] = HOLE
    with pytest.raises((BackendError, ValueError), match="block_table"):
        run_step(r.plan, r.store, [Part(sequence, [1])])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("layers", "copies"), [(1, (1,)), (2, (1, 2)), (3, (1, 2, 3)), (4, (1, 1, 2, 2)), (5, (1, 1, 2, 2, 3))]
)
def test_groups_of_copies(layers: int, copies: tuple[int, ...], backend: str) -> None:
    """Half as many layers in a group, so that blocks do not grow; except those of a single layer."""
    graph = graph_of(llama(num_hidden_layers=layers))
    assert graph.cache.newest_groups == copies and graph.cache.own_groups == 1
    assert groups_of(graph) == (None, *[Forgetting(NEWEST, 0, 256, copies=True)] * len(set(copies)))
    made, plain = backend_of(backend), replace(graph, cache=replace(graph.cache, newest=0, newest_groups=()))
    assert (made.block_bytes(graph, "int4") == made.block_bytes(plain, "int4")) == (layers > 1)


def test_what_has_copies() -> None:
    plain = plain_graph(llama())
    for kv in ("fp32", "bf16", "int8"):
        assert cached_in(plain, kv) is plain
    sparse = plain_graph(llama(), AttentionMode("sparse", window=32, sinks=4, budget=192))
    assert cached_in(sparse, "int4") is sparse
    grouped = cached_in(plain_graph(gemma2(sliding_window=50)), "int4").cache
    assert grouped.layer_groups == group_layers(plain_graph(gemma2(sliding_window=50))).cache.layer_groups
    assert min(grouped.newest_groups) == grouped.own_groups > 1
    spans = group_spans(cached_in(plain_graph(qwen2()), "int4"))
    assert spans[0] is None and set(spans[1:]) == {(NEWEST, 0)}
