"""Attention within chunks on every ISA: chunks of any size against Transformers, drafts, rollback, caches, missing blocks."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from deepseek_optimizer.backends.base import DECODE
from deepseek_optimizer.backends.reference import ReferenceBackend
from deepseek_optimizer.graph import rules
from deepseek_optimizer.models import build_graph
from support.family_configs import llama4_text
from support.models import assert_close_rows, random_ids, random_model, transformers_logits, weights_of
from support.steps import Part, make_batch, run_step, runner

from .packing import dequantized, packed_weights


def dense_model(chunk: int) -> Any:
    """All layers have chunks; the second one has no RoPE, and its queries grow with the position."""
    return random_model(
        llama4_text(
            attention_chunk_size=chunk,
            num_hidden_layers=2,
            no_rope_layers=[1, 0],
            layer_types=["chunked_attention"] * 2,
            moe_layers=[],
        )
    )


@pytest.mark.parametrize("names", [None, []], ids=["fused", "unfused"])
@pytest.mark.parametrize("chunk", [1, 32, 45, 300])
def test_chunks_of_any_size(backend, chunk, names):
    model = dense_model(chunk)
    graph, _ = rules.apply(build_graph(model.config), names)
    r = runner(backend, graph, packed_weights(weights_of(model), "fp32"))
    ids = random_ids(model.config, 400)
    expected = transformers_logits(model, ids)
    assert_close_rows(r.logits(ids), expected)
    assert_close_rows(r.logits(ids, chunks=(1, 43, 2, 200)), expected)
    assert_close_rows(r.logits(ids, chunks=(296, *[5] * 30), phase=DECODE), expected)


def test_rollback_across_a_boundary(backend):
    model = dense_model(45)
    graph, _ = rules.apply(build_graph(model.config), None)
    r = runner(backend, graph, packed_weights(weights_of(model), "fp32"))
    ids, other = random_ids(model.config, 100), random_ids(model.config, 60, seed=1)
    sequence = r.sequence()
    run_step(r.plan, r.store, [Part(sequence, ids)])
    sequence.crop(80)
    continued = run_step(r.plan, r.store, [Part(sequence, other)]).logits
    assert_close_rows(continued, transformers_logits(model, [*ids[:80], *other])[80:])


@pytest.mark.parametrize("kv, tolerance", [("bf16", 2e-2), ("int8", 5e-2)])
def test_cache_types(backend, kv, tolerance):
    model = dense_model(45)
    graph, _ = rules.apply(build_graph(model.config), None)
    weights = packed_weights(weights_of(model), "fp32")
    ids = random_ids(model.config, 150)
    expected = runner(ReferenceBackend(), graph, dequantized(weights)).logits(ids)
    r = runner(backend, graph, weights, kv=kv)
    assert_close_rows(r.logits(ids), expected, tolerance)
    assert_close_rows(r.logits(ids, phase=DECODE), expected, tolerance)


def test_blocks_before_the_window_may_be_missing(backend):
    """Every row's chunk lies within a window of its size, and the blocks before that are given back."""
    model = dense_model(40)
    graph, _ = rules.apply(build_graph(model.config), None)
    r = runner(backend, graph, packed_weights(weights_of(model), "fp32"))
    ids = random_ids(model.config, 200)
    whole = r.logits(ids)
    sequence = r.sequence()
    run_step(r.plan, r.store, [Part(sequence, ids[:190])])
    batch = make_batch([Part(sequence, ids[190:], DECODE)], r.store)
    batch.block_table[0, : (191 - 40) // 32] = -1
    assert torch.equal(r.plan.run(batch, r.store).logits, r.logits(ids, chunks=(190,), phase=DECODE)[190:])
    assert_close_rows(whole, transformers_logits(model, ids))
