"""The reference backend's attention modes: against Transformers' models with attention computed row by row, and each other."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch

from deepseek_optimizer.backends.base import DECODE
from deepseek_optimizer.backends.reference import ReferenceBackend, choose, ops
from deepseek_optimizer.cache.block_manager import SequenceBlocks
from deepseek_optimizer.errors import BackendError
from deepseek_optimizer.graph import rules
from deepseek_optimizer.graph.attention_mode import AttentionMode, apply_mode
from deepseek_optimizer.models import build_graph, build_mtp_graph
from support.family_configs import deepseek_v3, deepseek_v32
from support.models import CASES, assert_close_rows, random_ids, random_model, weights_of
from support.row_by_row import logits_in_mode
from support.steps import Part, make_batch, run_step, runner

SLIDING = AttentionMode("sliding", 37, 3)
SPARSE = AttentionMode("sparse", 40, 1, 160)
LENGTH = 230  # tokens: eight blocks, five of which are visible with SPARSE
MODELS = [
    "llama-gqa", "llama-mqa", "llama-wide-heads", "llama-dynamic", "qwen2-gqa", "qwen2-windows", "qwen3-gqa",
    "qwen3-layer-types", "deepseek_v2-greedy", "deepseek_v2-groups", "deepseek_v3-groups", "deepseek_v3-halves", "youtu-direct",
]  # fmt: skip
BUDGETS = {"sliding": AttentionMode("sliding", 4096, 4), "sparse": AttentionMode("sparse", 512, 4, 4096)}


@cache
def model_of(name: str) -> tuple[Any, list[int]]:
    model = random_model(CASES[name]())
    return model, random_ids(model.config, LENGTH)


def in_mode(model: Any, mode: AttentionMode, names: list[str] | None = None, config: Any = None, **options: Any) -> Any:
    graph, _ = apply_mode(rules.apply(build_graph(config or model.config), names)[0], mode)
    return runner(ReferenceBackend(), graph, weights_of(model), **options)


@pytest.mark.parametrize(
    ("name", "mode"),
    [*((name, mode) for name in MODELS for mode in (SLIDING, SPARSE)), ("deepseek_v32-indexer", SLIDING)],
    ids=lambda p: getattr(p, "kind", p),
)
def test_logits_equal_transformers_in_a_mode(name: str, mode: AttentionMode) -> None:
    """Whole and in chunks; with fusion rules and, for some, without."""
    model, ids = model_of(name)
    expected = logits_in_mode(model, ids, mode)
    run = in_mode(model, mode)
    assert_close_rows(run.logits(ids), expected)
    assert_close_rows(run.logits(ids, chunks=(1, 45, 32, 7, 90)), expected)
    assert_close_rows(run.logits(ids, chunks=(60, *[1] * 20, 100), phase=DECODE), expected)
    if name in ("llama-gqa", "deepseek_v3-groups"):
        assert_close_rows(in_mode(model, mode, []).logits(ids), expected)
        with pytest.raises(AssertionError):
            assert_close_rows(run.logits(ids), logits_in_mode(model, ids, AttentionMode()))  # some tokens are invisible


@pytest.mark.parametrize("kv", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize("kind", BUDGETS)
@pytest.mark.parametrize("name", [*MODELS, "deepseek_v32-indexer"])
def test_full_coverage_equals_flash(name: str, kind: str, kv: str) -> None:
    """If the window or the budget covers the whole text, results are equal up to the form of latent attention."""
    model, ids = model_of(name)
    config = deepseek_v32(**{**model.config.to_dict(), "index_topk": 4096}) if kind == "sliding" and "v32" in name else None
    exact = in_mode(model, AttentionMode(), config=config, kv=kv).logits(ids)
    assert_close_rows(in_mode(model, BUDGETS[kind], kv=kv).logits(ids), exact, 1e-5)


@pytest.mark.parametrize("kv", ["bf16", "int8"])
@pytest.mark.parametrize("mode", [SLIDING, SPARSE], ids=lambda m: m.kind)
@pytest.mark.parametrize("name", ["llama-gqa", "deepseek_v3-groups"])
def test_chunks_equal_the_whole_with_a_rounded_cache(name: str, mode: AttentionMode, kv: str) -> None:
    """Keys of a chunk are read as stored in the cache, so the boundaries of chunks do not matter."""
    model, ids = model_of(name)
    run = in_mode(model, mode, kv=kv)
    assert_close_rows(run.logits(ids, chunks=(33, 1, 100, 64)), run.logits(ids), 1e-4)


def test_sequences_of_a_step_are_independent() -> None:
    """Each has its own window, and its own blocks."""
    model, ids = model_of("qwen3-gqa")
    for mode in (SLIDING, SPARSE):
        run = in_mode(model, mode)
        one, two = run.sequence(), run.sequence()
        run_step(run.plan, run.store, [Part(one, ids[:200]), Part(two, ids[30:])])
        made = run_step(run.plan, run.store, [Part(one, ids[200:]), Part(two, ids[:25])]).logits
        assert_close_rows(made[: LENGTH - 200], run.logits(ids)[200:])
        assert_close_rows(made[LENGTH - 200 :], run.logits(ids[30:] + ids[:25])[-25:])


@pytest.mark.parametrize("mode", [SLIDING, SPARSE], ids=lambda m: m.kind)
def test_mtp_layers_use_the_same_mode(mode: AttentionMode) -> None:
    """It uses the model's cache, so it needs the same mode."""
    config = deepseek_v3()
    own, _ = apply_mode(build_graph(config, 1), mode)
    layer, places = apply_mode(build_mtp_graph(config, 0), mode)
    assert own.cache == layer.cache and places == ["layer 3"]


# ---- missing blocks


def holes(mode: AttentionMode, tokens: int) -> range:
    """Blocks that are invisible to all tokens from number `tokens` on."""
    return range(-(-mode.sinks // 32), max(0, tokens + 1 - mode.window) // 32)


@pytest.mark.parametrize("name", ["llama-gqa", "deepseek_v2-greedy", "deepseek_v3-halves"])
def test_invisible_blocks_may_be_missing(name: str) -> None:
    """Bitwise equal logits, whatever the memory of missing blocks contains; a visible missing block is an error."""
    model, ids = model_of(name)
    run = in_mode(model, SLIDING)
    sequence = run.sequence()
    run_step(run.plan, run.store, [Part(sequence, ids[:150])])
    for begin, end in ((150, 151), (151, 200), (200, LENGTH)):
        batch = make_batch([Part(sequence, ids[begin:end])], run.store)
        expected, whole = run.plan.run(batch, run.store).logits, batch.block_table.copy()
        batch.block_table[0, holes(SLIDING, begin)] = -1
        assert len(holes(SLIDING, begin)) and torch.equal(run.plan.run(batch, run.store).logits, expected)
        for block in (0, holes(SLIDING, begin).stop):
            batch.block_table[:] = whole
            batch.block_table[0, block] = -1
            with pytest.raises(BackendError, match="block_table"):
                run.plan.run(batch, run.store)


@pytest.mark.parametrize("mode", [AttentionMode(), SPARSE, SLIDING], ids=lambda m: m.kind)
def test_no_block_may_be_missing_with_full_attention(mode: AttentionMode) -> None:
    """qwen3-layer-types has a layer without a window between two with one."""
    model, ids = model_of("qwen3-layer-types")
    run = in_mode(model, mode)
    sequence = SequenceBlocks(run.manager)
    run_step(run.plan, run.store, [Part(sequence, ids[:150])])
    batch = make_batch([Part(sequence, ids[150:])], run.store)
    batch.block_table[0, 1] = -1
    if mode is SLIDING:
        run.plan.run(batch, run.store)
    else:
        with pytest.raises(BackendError, match="block_table"):
            run.plan.run(batch, run.store)


# ---- the choice of blocks


def slowly(q: np.ndarray, keys: np.ndarray, i: int, blocks: int, sinks: int, window: int, exact: bool) -> list[int]:
    """The definition, for one row and one group of heads: q [group, width], keys [tokens, width]."""
    seen = i // 32 + 1
    if seen <= blocks:
        return list(range(seen))
    first, last = -(-sinks // 32), max(0, i + 1 - window) // 32
    estimates = []
    for b in range(first, last):
        ends = torch.from_numpy(np.stack((keys[32 * b : 32 * b + 32].max(0), keys[32 * b : 32 * b + 32].min(0))))
        largest, smallest = (ends if exact else ends.bfloat16()).double().numpy()
        estimates.append(np.maximum(q * largest, q * smallest).sum(-1))
    behind = (np.array(estimates) - np.max(estimates, 0)).max(-1)
    left = blocks - first - (seen - last)
    ranked = sorted(range(first, last), key=lambda b: (-behind[b - first], b))
    return sorted([*range(first), *ranked[:left], *range(last, seen)])


@pytest.mark.parametrize("seed", range(25))
def test_chosen_blocks(seed: int) -> None:
    """Odd shapes, chunk boundaries anywhere, integers so that estimates are often equal."""
    draw = np.random.default_rng(seed)
    heads, group, width = int(draw.integers(1, 4)), int(draw.integers(1, 5)), int(draw.integers(1, 20))
    sinks, window = int(draw.integers(0, 70)), int(draw.integers(1, 90))
    blocks = -(-sinks // 32) + -(-window // 32) + 2 + int(draw.integers(0, 4))
    context, queries = int(draw.integers(0, 700)), int(draw.integers(1, 80))
    few = seed % 2 == 0
    keys = (
        draw.integers(-2, 3, (context + queries, heads, width))
        if few
        else draw.standard_normal((context + queries, heads, width))
    )
    q = draw.integers(-2, 3, (queries, heads, group, width)) if few else draw.standard_normal((queries, heads, group, width))
    keys, q = keys.astype(np.float32), q.astype(np.float32)
    exact = seed % 3 == 0
    made = choose.choose_blocks(torch.from_numpy(q), torch.from_numpy(keys), context, blocks, sinks, window, exact)
    assert made.shape == (queries, heads, blocks)
    for i in range(queries):
        for h in range(heads):
            wanted = slowly(q[i, h].astype(np.float64), keys[:, h], context + i, blocks, sinks, window, exact)
            assert made[i, h].tolist() == [*wanted, *[-1] * (blocks - len(wanted))], f"row {context + i}, head {h}"
    tokens = choose.tokens_of(made[:, 0], context)
    for i in range(queries):
        wanted = [32 * int(b) + n for b in made[i, 0] if b >= 0 for n in range(32) if 32 * int(b) + n <= context + i]
        assert tokens[i].tolist() == [*wanted, *[-1] * (32 * blocks - len(wanted))]


def test_an_estimate_is_never_below_a_logit() -> None:
    q, keys = torch.randn(7, 2, 3, 16), torch.randn(64, 2, 16)
    actual = choose.estimates(q, *choose.summaries(keys, True))
    logits = torch.einsum("qhgd,khd->qhgk", q, keys).unflatten(-1, (2, 32)).amax(-1)
    assert (actual >= logits - 1e-5).all()


def test_tokens_of_a_window() -> None:
    """Only blocks with a visible token are read."""
    for queries, context, window, sinks in ((1, 0, 5, 2), (3, 100, 37, 3), (40, 300, 64, 33), (5, 70, 200, 0), (1, 319, 32, 0)):
        blocks, tokens = ops.visible_blocks(queries, context, window, sinks, torch.device("cpu"))
        seen = ops.visible(queries, context, torch.arange(context + queries), window, sinks).any(0).nonzero()[:, 0]
        assert set(blocks.tolist()) == set((seen // 32).tolist())
        assert tokens.tolist() == [t for t in range(context + queries) if t // 32 in set(blocks.tolist())]
