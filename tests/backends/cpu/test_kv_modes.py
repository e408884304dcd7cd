"""Attention modes over keys and values in native plans, on every ISA: against the reference, in chunks, in batches, with
dropped blocks."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from deepseek_optimizer.backends.base import DECODE, PREFILL
from deepseek_optimizer.backends.cpu import native
from deepseek_optimizer.backends.reference import ReferenceBackend
from deepseek_optimizer.errors import BackendError
from deepseek_optimizer.graph import rules
from deepseek_optimizer.graph.attention_mode import AttentionMode, apply_mode
from deepseek_optimizer.graph.ir import CacheSpec, Graph
from deepseek_optimizer.models import build_graph
from support.family_configs import llama
from support.models import CASES, assert_close_rows, random_ids, random_model, weights_of
from support.steps import Part, make_batch, run_step, runner

from .packing import packed_weights

SLIDING = AttentionMode("sliding", window=70, sinks=5)
SPARSE = AttentionMode("sparse", window=40, sinks=5, budget=192)
MODES = pytest.mark.parametrize("mode", [SLIDING, SPARSE], ids=lambda m: m.kind)
PHASES = pytest.mark.parametrize("phase", [PREFILL, DECODE], ids=["prefill", "decode"])


def model_of(**fields: Any) -> Any:
    return random_model(llama(**{"num_hidden_layers": 2, **fields}))


def graph_of(model: Any, mode: AttentionMode, names: list[str] | None = None) -> Graph:
    return apply_mode(rules.apply(build_graph(model.config), names)[0], mode)[0]


def test_caches_in_fp8_are_refused(backend):
    graph = build_graph(llama())
    for call in (lambda: backend.block_bytes(graph, "fp8"), lambda: backend.new_store(graph, "fp8", 4)):
        with pytest.raises(BackendError, match="cpu backend does not support KV cache dtype 'fp8'; choose kv_cache among"):
            call()


@PHASES
@MODES
def test_logits_equal_the_reference(backend, mode, phase):
    """None of these rows has a tie, which is rare."""
    model = model_of()
    graph, ids = graph_of(model, mode), random_ids(model.config, 600)
    expected = runner(ReferenceBackend(), graph, weights_of(model)).logits(ids)
    r = runner(backend, graph, packed_weights(weights_of(model), "fp32"))
    assert_close_rows(r.logits(ids, phase=phase), expected)
    assert_close_rows(r.logits(ids, chunks=(1, 7, 64, 300), phase=phase), expected)


@MODES
@pytest.mark.parametrize(
    "name", ["llama-mqa", "llama-wide-heads", "qwen2-gqa", "qwen2-windows", "qwen3-gqa", "qwen3-layer-types"]
)
def test_families(backend, name, mode):
    """With and without rules; a model's own windows stay."""
    model = random_model(CASES[name]())
    ids = random_ids(model.config, 300)
    for names in (None, []):
        graph = graph_of(model, mode, names)
        expected = runner(ReferenceBackend(), graph, weights_of(model)).logits(ids)
        assert_close_rows(runner(backend, graph, packed_weights(weights_of(model), "fp32")).logits(ids), expected)


@pytest.mark.parametrize("kv", ["bf16", "int8"])
@MODES
def test_small_caches(backend, mode, kv):
    """Mean over rows: rounding can also change the order of close estimates, and a row with another block differs."""
    model = model_of()
    graph, ids = graph_of(model, mode), random_ids(model.config, 400)
    expected = runner(ReferenceBackend(), graph, weights_of(model), kv=kv).logits(ids)
    made = runner(backend, graph, packed_weights(weights_of(model), "fp32"), kv=kv).logits(ids)
    error = (made - expected).abs().amax(-1) / expected.abs().amax(-1)
    assert error.mean() <= 1e-2
    assert error[: SPARSE.budget].max() <= 2e-2  # rows without a choice


@pytest.mark.parametrize("kv", ["fp32", "bf16", "int8", "int4"])
@PHASES
def test_full_coverage_equals_flash(backend, phase, kv):
    """Bitwise equal, also if only the sinks make the window complete."""
    model = model_of()
    ids, weights = random_ids(model.config, 330), packed_weights(weights_of(model), "bf16")
    flash = runner(backend, graph_of(model, AttentionMode()), weights, kv=kv).logits(ids, phase=phase)
    for mode in (
        AttentionMode("sliding", 330, 0), AttentionMode("sliding", 4000, 4), AttentionMode("sliding", 10, 320),
        AttentionMode("sparse", 64, 4, 352),
    ):  # fmt: skip
        assert torch.equal(flash, runner(backend, graph_of(model, mode), weights, kv=kv).logits(ids, phase=phase)), mode


@pytest.mark.parametrize("kv", ["fp32", "bf16", "int8", "int4"])
@PHASES
@MODES
def test_rows_do_not_depend_on_the_batch(backend, mode, phase, kv):
    """For any chunks and other sequences; and a block that is visible to no row may be missing."""
    model = model_of()
    r = runner(backend, graph_of(model, mode), packed_weights(weights_of(model), "bf16"), kv=kv)
    ids = random_ids(model.config, 330)
    alone = r.logits(ids, phase=phase)
    assert torch.equal(alone, r.logits(ids, chunks=(1, 30, 5, 240), phase=phase))
    mine, other, rows = r.sequence(), r.sequence(), []
    run_step(r.plan, r.store, [Part(other, random_ids(model.config, 250, seed=1))])
    for begin, end in ((0, 150), (150, 230), (230, 231), (231, 330)):
        batch = make_batch([Part(other, [7, 8, 9], phase), Part(mine, ids[begin:end], phase)], r.store)
        if mode is SLIDING:
            batch.block_table[1, 1 : max(0, begin + 1 - mode.window) // 32] = -1
        rows.append(r.plan.run(batch, r.store).logits[3:])
    assert torch.equal(alone, torch.cat(rows))


def test_visible_missing_blocks_are_rejected(backend):
    model = model_of()
    for mode, hole in ((SLIDING, 0), (SLIDING, 3), (SPARSE, 2), (AttentionMode(), 2)):
        r = runner(backend, graph_of(model, mode), packed_weights(weights_of(model), "fp32"))
        sequence = r.sequence()
        run_step(r.plan, r.store, [Part(sequence, random_ids(model.config, 160))])
        batch = make_batch([Part(sequence, [1])], r.store)
        batch.block_table[0, hole] = -1
        with pytest.raises(ValueError, match=rf"block_table\[0\]\[{hole}\] is -1"):
            r.plan.run(batch, r.store)


def test_bytes_of_a_cache_with_summaries():
    """Two more elements for each of a block's 64; and a plan with sparse attention rejects a cache without them."""
    spec = CacheSpec(3, 2, 16)
    for kv, number in (("fp32", 4), ("bf16", 2), ("int8", 2)):
        plain, more = (native.block_bytes(CacheSpec(3, 2, 16, summaries), kv) for summaries in (False, True))
        assert more - plain == 2 * number * spec.layers * spec.kv_heads * spec.head_dim


def test_a_cache_without_summaries_is_rejected(backend):
    model = model_of()
    r = runner(backend, graph_of(model, SPARSE), packed_weights(weights_of(model), "fp32"))
    r.store = backend.new_store(graph_of(model, SLIDING), "fp32", 8)
    with pytest.raises(ValueError, match="no summaries"):
        run_step(r.plan, r.store, [Part(r.sequence(), [1, 2, 3])])
