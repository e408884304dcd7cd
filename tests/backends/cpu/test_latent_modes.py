"""Modes of latent attention in native plans, on every ISA: against the reference, in chunks, in batches, with blocks
dropped."""

from __future__ import annotations

import pytest
import torch

from deepseek_optimizer.backends.base import DECODE, PREFILL
from deepseek_optimizer.backends.reference import ReferenceBackend
from deepseek_optimizer.graph import rules
from deepseek_optimizer.graph.attention_mode import AttentionMode, apply_mode
from deepseek_optimizer.graph.ir import Graph
from deepseek_optimizer.models import build_graph
from support.family_configs import deepseek_v32, youtu
from support.models import assert_close_rows, random_ids, random_model, weights_of
from support.steps import Part, make_batch, run_step, runner

from .packing import packed_weights

SLIDING = AttentionMode("sliding", window=70, sinks=5)
SPARSE = AttentionMode("sparse", window=40, sinks=5, budget=192)


def latent_model(v32: bool = False):
    if v32:  # without experts, whose near ties are unrelated to attention
        return random_model(deepseek_v32(first_k_dense_replace=3, index_topk=40))
    sizes = {"kv_lora_rank": 96, "qk_nope_head_dim": 16, "qk_rope_head_dim": 64, "v_head_dim": 48}
    return random_model(youtu(num_attention_heads=20, num_hidden_layers=2, **sizes))


def graph_of(model, mode: AttentionMode, absorbed: bool = True) -> Graph:
    graph, _ = rules.apply(build_graph(model.config), [n for n in rules.RULES if absorbed or n != "mla_absorb"])
    return apply_mode(graph, mode)[0]


# Forms of attention: whether the graph is absorbed, and the phase.
WAYS = {"absorbed": (True, DECODE), "expanded": (False, PREFILL), "cheaper": (True, PREFILL)}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("v32", [False, True], ids=["youtu", "v32"])
def test_sliding_equals_the_reference(backend, way, v32):
    model, (absorbed, phase) = latent_model(v32), WAYS[way]
    graph, ids = graph_of(model, SLIDING, absorbed), random_ids(model.config, 600)
    expected = runner(ReferenceBackend(), graph, weights_of(model)).logits(ids)
    r = runner(backend, graph, packed_weights(weights_of(model), "fp32"))
    assert_close_rows(r.logits(ids, phase=phase), expected)
    assert_close_rows(r.logits(ids, chunks=(1, 7, 64, 300), phase=phase), expected)


@pytest.mark.parametrize(("kv", "tolerance"), [("bf16", 2e-2), ("int8", 2e-2)])
def test_sliding_over_small_caches(backend, kv, tolerance):
    model = latent_model()
    ids, weights = random_ids(model.config, 300), packed_weights(weights_of(model), "fp32")
    expected = runner(ReferenceBackend(), graph_of(model, SLIDING), weights_of(model), kv=kv).logits(ids)
    for absorbed, phase in WAYS.values():
        assert_close_rows(
            runner(backend, graph_of(model, SLIDING, absorbed), weights, kv=kv).logits(ids, phase=phase), expected, tolerance
        )


@pytest.mark.parametrize("kv", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize("way", ["absorbed", "expanded"])
def test_a_window_over_everything_equals_flash(backend, way, kv):
    """Bitwise equal, also if only the sinks make the window complete."""
    model, (absorbed, phase) = latent_model(), WAYS[way]
    ids, weights = random_ids(model.config, 300), packed_weights(weights_of(model), "bf16")
    flash = runner(backend, graph_of(model, AttentionMode(), absorbed), weights, kv=kv).logits(ids, phase=phase)
    for window, sinks in ((300, 0), (4000, 4), (10, 290)):
        mode = AttentionMode("sliding", window=window, sinks=sinks)
        assert torch.equal(flash, runner(backend, graph_of(model, mode, absorbed), weights, kv=kv).logits(ids, phase=phase))


@pytest.mark.parametrize("kv", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize("way", ["absorbed", "expanded"])
def test_rows_with_a_window_do_not_depend_on_the_batch(backend, way, kv):
    """For any chunks and other sequences; and a block that is visible to no row may be missing."""
    model, (absorbed, phase) = latent_model(), WAYS[way]
    r = runner(backend, graph_of(model, SLIDING, absorbed), packed_weights(weights_of(model), "bf16"), kv=kv)
    ids = random_ids(model.config, 330)
    alone = r.logits(ids, phase=phase)
    assert torch.equal(alone, r.logits(ids, chunks=(1, 30, 5, 240), phase=phase))
    mine, other, rows = r.sequence(), r.sequence(), []
    run_step(r.plan, r.store, [Part(other, random_ids(model.config, 40, seed=1))])
    for begin, end in ((0, 150), (150, 230), (230, 231), (231, 330)):
        batch = make_batch([Part(other, [7, 8, 9], phase), Part(mine, ids[begin:end], phase)], r.store)
        batch.block_table[1, 1 : max(0, begin + 1 - SLIDING.window) // 32] = -1
        rows.append(r.plan.run(batch, r.store).logits[3:])
    assert torch.equal(alone, torch.cat(rows))


def test_sparse_equals_the_reference(backend):
    """None of these rows has a tie, which is rare."""
    model = latent_model()
    graph, ids = graph_of(model, SPARSE), random_ids(model.config, 600)
    expected = runner(ReferenceBackend(), graph, weights_of(model)).logits(ids)
    r = runner(backend, graph, packed_weights(weights_of(model), "fp32"))
    for phase in (PREFILL, DECODE):
        assert_close_rows(r.logits(ids, phase=phase), expected)
        assert_close_rows(r.logits(ids, chunks=(1, 7, 64, 300), phase=phase), expected)


@pytest.mark.parametrize("kv", ["bf16", "int8"])
def test_sparse_over_small_caches(backend, kv):
    """Mean over rows: rounding can also change the order of close estimates, and a row with another block differs."""
    model = latent_model()
    ids, weights = random_ids(model.config, 400), packed_weights(weights_of(model), "fp32")
    expected = runner(ReferenceBackend(), graph_of(model, SPARSE), weights_of(model), kv=kv).logits(ids)
    made = runner(backend, graph_of(model, SPARSE), weights, kv=kv).logits(ids)
    error = (made - expected).abs().amax(-1) / expected.abs().amax(-1)
    assert error.mean() <= 2e-2
    assert error[: SPARSE.budget].max() <= 2e-2  # rows with full attention


@pytest.mark.parametrize("kv", ["fp32", "bf16", "int8"])
def test_sparse_rows_do_not_depend_on_the_batch(backend, kv):
    """For any chunks and other sequences; rows with full attention are bitwise equal to those without a choice."""
    model = latent_model()
    weights = packed_weights(weights_of(model), "bf16")
    r = runner(backend, graph_of(model, SPARSE), weights, kv=kv)
    ids = random_ids(model.config, 330)
    alone = r.logits(ids, phase=DECODE)
    assert torch.equal(alone, r.logits(ids, chunks=(1, 30, 5, 240), phase=DECODE))
    flash = runner(backend, graph_of(model, AttentionMode()), weights, kv=kv).logits(ids, phase=DECODE)
    assert torch.equal(alone[: SPARSE.budget], flash[: SPARSE.budget])
    assert not torch.equal(alone, flash)
    mine, other, rows = r.sequence(), r.sequence(), []
    run_step(r.plan, r.store, [Part(other, random_ids(model.config, 250, seed=1))])
    for begin, end in ((0, 150), (150, 230), (230, 231), (231, 330)):
        parts = [Part(other, [7, 8, 9], DECODE), Part(mine, ids[begin:end], DECODE)]
        rows.append(run_step(r.plan, r.store, parts).logits[3:])
    assert torch.equal(alone, torch.cat(rows))


def test_sparse_attention_keeps_a_trained_indexer(backend):
    model = latent_model(v32=True)
    weights, ids = packed_weights(weights_of(model), "fp32"), random_ids(model.config, 300)
    flash, sparse = (runner(backend, graph_of(model, mode), weights).logits(ids) for mode in (AttentionMode(), SPARSE))
    assert torch.equal(flash, sparse)
