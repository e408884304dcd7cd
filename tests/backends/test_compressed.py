"""Compressed attention and hyper-connections (DeepSeek-V4), of both backends, against Transformers and the formulas."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch

from deepseek_optimizer.backends.base import DECODE, PREFILL
from deepseek_optimizer.backends.cpu import CpuBackend, unavailable_reason
from deepseek_optimizer.backends.reference import ReferenceBackend, compressed, streams
from deepseek_optimizer.backends.reference.store import make_store
from deepseek_optimizer.cache import Forgetting
from deepseek_optimizer.graph import rules
from deepseek_optimizer.graph.cache_groups import group_layers, group_spans
from deepseek_optimizer.graph.ir import CachedRows, RowsSpec
from deepseek_optimizer.models import build_graph
from support.family_configs import deepseek_v4
from support.models import assert_close_rows, random_ids, random_model, transformers_logits, weights_of
from support.steps import Part, Runner, run_step, runner

from .cpu.packing import packed_weights

BACKENDS: dict[str, Any] = {"reference": ReferenceBackend, "cpu": CpuBackend}
SPARSE, HEAVY, SLIDING = "compressed_sparse_attention", "heavily_compressed_attention", "sliding_attention"
CPU = torch.device("cpu")


@pytest.fixture(params=list(BACKENDS))
def backend(request: pytest.FixtureRequest) -> Any:
    if request.param == "cpu" and (reason := unavailable_reason()) is not None:
        pytest.skip(reason)
    return BACKENDS[request.param]()


def run_of(backend: Any, config: Any, **options: Any) -> tuple[Any, Runner]:
    model = random_model(config)
    graph, _ = rules.apply(build_graph(config))
    return model, runner(backend, graph, packed_weights(weights_of(model), "fp32"), **options)


def test_a_prompt_cut_at_every_place_of_its_windows(backend: Any) -> None:
    """Windows of 3 and 7 tokens begin together every 21 tokens."""
    model, run = run_of(backend, deepseek_v4())
    ids = random_ids(model.config, 63)
    expected = transformers_logits(model, ids)
    for cut in range(21, 42):
        assert_close_rows(run.logits(ids, chunks=[cut]), expected)
    assert_close_rows(run.logits(ids, chunks=[1] * 63, phase=DECODE), expected)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 6, 7, 8])
def test_prompts_about_as_long_as_a_window(backend: Any, count: int) -> None:
    model, run = run_of(backend, deepseek_v4())
    ids = random_ids(model.config, count)
    assert_close_rows(run.logits(ids), transformers_logits(model, ids))


@pytest.mark.parametrize("top_k", [1, 30, 64])
def test_more_and_fewer_entries_than_are_chosen(backend: Any, top_k: int) -> None:
    kinds = [SPARSE, SPARSE, SLIDING]
    fields = {"layer_types": kinds, "num_hidden_layers": 3, "mlp_layer_types": ["moe", "hash_moe", "moe"]}
    model, run = run_of(backend, deepseek_v4(index_topk=top_k, **fields))
    ids = random_ids(model.config, 100)
    assert_close_rows(run.logits(ids, chunks=[50]), transformers_logits(model, ids))


@pytest.mark.parametrize("every", [1, 2, 5, 31, 32, 33, 64])
def test_entries_of_any_number_of_tokens(backend: Any, every: int) -> None:
    """An entry lies in the block of its last token, one or several in a block."""
    rates = {SPARSE: every, HEAVY: every}
    fields = {"layer_types": [SPARSE, HEAVY], "num_hidden_layers": 2, "mlp_layer_types": ["moe", "moe"]}
    model, run = run_of(backend, deepseek_v4(compress_rates=rates, **fields))
    ids = random_ids(model.config, 150)
    assert_close_rows(run.logits(ids, chunks=[70, 1, 33]), transformers_logits(model, ids))


def test_sequences_cropped_anywhere_continue_as_new_ones(backend: Any) -> None:
    model = random_model(deepseek_v4())
    graph = group_layers(rules.apply(build_graph(model.config))[0])
    groups = tuple(None if span is None else Forgetting(*span, 64) for span in group_spans(graph))
    plan = backend.compile(graph, packed_weights(weights_of(model), "fp32"))
    run = Runner(plan, backend.new_store(graph, "fp32", 200), groups)
    ids, others = random_ids(model.config, 80), random_ids(model.config, 20, seed=1)
    for kept in range(50, 80, 3):
        sequence, fresh = run.sequence(), run.sequence()
        run_step(plan, run.store, [Part(sequence, ids)])
        sequence.forget()
        sequence.crop(kept)
        continued = run_step(plan, run.store, [Part(sequence, others, DECODE)]).logits
        run_step(plan, run.store, [Part(fresh, ids[:kept])])
        expected = run_step(plan, run.store, [Part(fresh, others, DECODE)]).logits
        assert_close_rows(continued, expected, 0.0 if isinstance(backend, CpuBackend) else 1e-5)
        sequence.free()
        fresh.free()


@pytest.mark.parametrize("kv", ["fp32", "bf16", "int8", "fp8", "int4"])
def test_a_step_of_several_sequences_equals_steps_of_each(backend: Any, kv: str) -> None:
    if kv not in backend.capabilities.kv_dtypes:
        pytest.skip(f"the {backend.name} backend has no cache in {kv}")
    model, run = run_of(backend, deepseek_v4(), kv=kv)
    rng = random.Random(0)
    alone, together = [run.sequence() for _ in range(3)], [run.sequence() for _ in range(3)]
    for step in range(4):
        phases = [DECODE if step and n == 0 else PREFILL for n in range(3)]
        ids = [[rng.randrange(131) for _ in range(rng.choice((1, 5, 40)))] for _ in range(3)]
        rows = [run_step(run.plan, run.store, [Part(*given)]).logits for given in zip(alone, ids, phases, strict=True)]
        both = run_step(run.plan, run.store, [Part(*given) for given in zip(together, ids, phases, strict=True)]).logits
        # torch's products of other numbers of rows have other rounding errors, which change some of the rounded entries
        assert_close_rows(both, torch.cat(rows), 0.0 if isinstance(backend, CpuBackend) else 1e-4 if kv == "fp32" else 5e-3)


@pytest.mark.parametrize("kv, tolerance", [("bf16", 0.05), ("int8", 0.1), ("int4", 0.6)])
def test_backends_round_the_cache_alike(kv: str, tolerance: float) -> None:
    """The mean error of logits against fp32 is that of the format in both backends; native attention also rounds queries and
    weights to bf16."""
    if (reason := unavailable_reason()) is not None:
        pytest.skip(reason)
    errors = []
    for made in (ReferenceBackend(), CpuBackend()):
        model, run = run_of(made, deepseek_v4(head_dim=64), kv=kv)
        ids = random_ids(model.config, 100)
        expected = transformers_logits(model, ids)
        errors.append(float((run.logits(ids) - expected).abs().mean() / expected.abs().mean()))
    assert max(errors) < tolerance and errors[1] < 3 * errors[0] + 1e-3


@pytest.mark.parametrize("format", ["bf16", "fp8", "int8", "int4", "q4_1", "mxfp4"])
def test_packed_formats(format: str) -> None:
    """Decode steps and prompts give the same bits. Both backends agree up to rounding; where activations are rounded to few
    bits, that may change which entries and experts are chosen for some rows."""
    if (reason := unavailable_reason()) is not None:
        pytest.skip(reason)
    model = random_model(deepseek_v4())
    graph, _ = rules.apply(build_graph(model.config))
    weights, ids = packed_weights(weights_of(model), format), random_ids(model.config, 60)
    own = runner(CpuBackend(), graph, weights)
    logits = own.logits(ids, chunks=[25])
    assert torch.equal(own.logits(ids, chunks=[1] * 60, phase=DECODE), logits)
    expected = runner(ReferenceBackend(rounding="format"), graph, weights).logits(ids)
    errors = (logits - expected).abs().amax(-1) / expected.abs().amax(-1)
    assert errors.median() < (1e-3 if format in ("int8", "q4_1") else 0.05)


def test_rows_are_read_back(backend: Any) -> None:
    _, run = run_of(backend, deepseek_v4(), kv="bf16")
    sequence = run.sequence()
    run_step(run.plan, run.store, [Part(sequence, list(range(1, 71)))])
    kinds = build_graph(deepseek_v4()).cache.rows
    for kind, rows in enumerate(kinds):
        values, other = run.store.read(kind, sequence.table(), 70)
        assert other is None and values.shape == (70 // rows.every, rows.width)
        assert values.isfinite().all() and values.abs().amax(-1).min() > 0
    saved = [run.store.read_block(block) for block in sequence.blocks]
    moved = [run.manager.allocate(1)[0] for _ in saved]
    for block, content in zip(moved, saved, strict=True):
        run.store.write_block(block, content)
    for kind in range(len(kinds)):
        again = run.store.read(kind, np.array(moved, np.int32), 70)[0]
        assert torch.equal(again, run.store.read(kind, sequence.table(), 70)[0])


def test_entries_equal_the_formula() -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(3, 4, 2 * 2 * 6, generator=generator, dtype=torch.float64)
    bias = torch.randn(4, 2 * 6, generator=generator, dtype=torch.float64)
    before = torch.cat((torch.full_like(rows[:1], torch.nan), rows[:-1]))
    made = compressed.entries(rows, before, bias)
    for e in range(3):
        for i in range(6):
            logits, values = [], []
            for window, part in ((e - 1, 0), (e, 6)):
                for t in range(4 if window >= 0 else 0):
                    values.append(float(rows[window, t, part + i]))
                    logits.append(float(rows[window, t, 12 + part + i] + bias[t, part + i]))
            weights = np.exp(logits) / np.exp(logits).sum()
            assert abs(float(made[e, i]) - float((weights * values).sum())) < 1e-12


def test_mixing_matrices_are_nearly_doubly_stochastic() -> None:
    x = torch.randn(5, 24, generator=torch.Generator().manual_seed(0))
    weights = streams.weights(x, torch.zeros(24), torch.ones(3), 4, 20, 1e-6)
    comb = weights[:, 8:].unflatten(-1, (4, 4))
    assert (comb.sum(1) - 1).abs().max() < 1e-4 and (comb.sum(2) - 1).abs().max() < 1e-2
    assert (weights[:, :4] > 0).all() and (weights[:, 4:8] < 2).all()


def test_groups_of_rows_have_one_window_each() -> None:
    graph = group_layers(build_graph(deepseek_v4()))
    for group, span in enumerate(group_spans(graph)):
        windows = {rows.window for i, rows in enumerate(graph.cache.rows) if graph.cache.group_of(i) == group}
        assert windows == {0 if span is None else span[0]}


def test_a_cache_of_other_rows_is_an_error(backend: Any) -> None:
    _, run = run_of(backend, deepseek_v4())
    if isinstance(backend, ReferenceBackend):
        pytest.skip("torch's own errors")
    other = build_graph(deepseek_v4(head_dim=24))
    run.store = backend.new_store(other, "fp32", 20)
    with pytest.raises(ValueError, match="rows of 24 elements"):
        run.logits([1, 2, 3])


def test_block_bytes_of_the_reference() -> None:
    spec = RowsSpec((CachedRows(130, 4), CachedRows(10, 1, 8, rounded=False)), (0, 1))
    for kv, sizes in {"fp32": (8 * 130 * 4, 32 * 10 * 4), "int8": (8 * 130 + 8 * 2 * 4, 32 * 10 * 2)}.items():
        assert max(sizes) <= make_store(spec, kv, 4, CPU).block_bytes < max(sizes) + 128
