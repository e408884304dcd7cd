"""DeepSeek's sparse attention in native plans, on every ISA: the indexer alone against scores in float64, and whole models
against Transformers."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from deepseek_optimizer.backends.base import DECODE, PREFILL
from deepseek_optimizer.backends.reference import ReferenceBackend
from deepseek_optimizer.backends.reference.latent import index_scores
from deepseek_optimizer.backends.reference.ops import layer_norm, rope, rope_table
from deepseek_optimizer.graph import rules
from deepseek_optimizer.graph.ir import Graph, LatentSpec, Node, Value
from deepseek_optimizer.models import build_graph
from support.family_configs import deepseek_v32
from support.models import CASES, assert_close_rows, random_ids, random_model, transformers_logits, weights_of
from support.steps import Part, run_step, runner

from .packing import packed_weights

VOCAB, HEADS, INDEX, ROT, TOP_K = 97, 20, 24, 12, 40
SCALE = (INDEX * HEADS) ** -0.5
TIE = 1e-5  # the order of scores that are closer than this, relative to the row's largest, may differ


def indexer_graph() -> Graph:
    """The indexer's nodes as in a family's graph. Hidden state 0 is its choice, as wide as an embedding."""
    x, table, q, turned = Value("x", TOP_K), Value("table", ROT), Value("q", HEADS * INDEX), Value("q.rope", HEADS * INDEX)
    k, normed, key, w = Value("k", INDEX), Value("k.norm", INDEX), Value("k.rope", INDEX), Value("w", HEADS)
    chosen, logits = Value("chosen", TOP_K), Value("logits", VOCAB)
    spec = next(n.attrs["rope"] for n in build_graph(CASES["deepseek_v32-indexer"]()).nodes if n.op == "rope_table")
    turn = {"head_dim": INDEX, "offset": 0, "interleaved": False}
    choice = {"layer": 1, "heads": HEADS, "index": INDEX, "top_k": TOP_K, "scale": SCALE}
    nodes = [
        Node("embedding", (), (x,), ("embed.weight",), {"scale": 1.0}),
        Node("rope_table", (), (table,), (), {"rope": spec}),
        Node("linear", (x,), (q, k), ("q.weight", "k.weight"), {"biases": (None, None)}),
        Node("linear", (x,), (w,), ("w.weight",), {"biases": (None,)}),
        Node("rope", (q, table), (turned,), (), {"heads": HEADS, **turn}),
        Node("layer_norm", (k,), (normed,), ("norm.weight", "norm.bias"), {"eps": 1e-6}),
        Node("rope", (normed, table), (key,), (), {"heads": 1, **turn}),
        Node("index_write", (key,), (), (), {"layer": 1}),
        Node("index_choose", (turned, w), (chosen,), (), choice),
        Node("hidden_out", (chosen,), (), (), {"index": 0}),
        Node("lm_head", (x,), (logits,), ("head.weight",), {"bias": None}),
    ]  # fmt: skip
    return Graph("indexer", nodes, VOCAB, TOP_K, 1, LatentSpec(2, 6, 4, INDEX), 4096)


def indexer_weights() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "embed": (VOCAB, TOP_K),
        "q": (HEADS * INDEX, TOP_K),
        "k": (INDEX, TOP_K),
        "w": (HEADS, TOP_K),
        "head": (VOCAB, TOP_K),
    }
    made = {f"{name}.weight": torch.randn(shape, generator=generator) * TOP_K**-0.5 for name, shape in shapes.items()}
    return made | {f"norm.{leaf}": torch.randn(INDEX, generator=generator) for leaf in ("weight", "bias")}


def scores_of(weights: dict[str, torch.Tensor], ids: list[int]) -> torch.Tensor:
    """float64 [T, T] of every token against every token."""
    w = {name: tensor.double() for name, tensor in weights.items()}
    spec = next(n.attrs["rope"] for n in indexer_graph().nodes if n.op == "rope_table")
    table = rope_table(torch.arange(len(ids)), torch.as_tensor(spec.inv_freq), spec.scaling)
    x = w["embed.weight"][ids]
    q = rope(x @ w["q.weight"].T, table, HEADS, False).unflatten(-1, (HEADS, INDEX))
    k = rope(layer_norm(x @ w["k.weight"].T, w["norm.weight"], w["norm.bias"], 1e-6), table, 1, False)
    return index_scores(q, x @ w["w.weight"].T, k, SCALE)


def check_choice(chosen: torch.Tensor, scores: torch.Tensor, tie: float) -> None:
    """The choice is ascending and visible, and no rejected score exceeds a chosen one by more than `tie` of the largest."""
    for row, (places, score) in enumerate(zip(chosen.long(), scores, strict=True)):
        count, seen = min(row + 1, TOP_K), score[: row + 1]
        taken = places[:count]
        assert (places[count:] == -1).all()
        assert (taken[0] >= 0) and (taken[-1] <= row) and (taken.diff() > 0).all()
        left = torch.ones(row + 1, dtype=torch.bool)
        left[taken] = False
        if left.any():
            assert seen[left].max() <= seen[taken].min() + tie * seen.abs().max()


def chosen_by(r, ids: list[int], chunks: tuple[int, ...] = (), phase: int = PREFILL) -> torch.Tensor:
    blocks, made, begin = r.sequence(), [], 0
    for size in (*chunks, len(ids)):
        if part := ids[begin : begin + size]:
            made.append(run_step(r.plan, r.store, [Part(blocks, part, phase)], hidden=True).hidden[0])
        begin += size
    blocks.free()
    return torch.cat(made)


@pytest.mark.parametrize(("kv", "tie"), [("fp32", TIE), ("bf16", 2e-2), ("int8", 2e-2)])
def test_the_choice_follows_the_scores(backend, kv, tie):
    weights, ids = indexer_weights(), random_ids(SimpleNamespace(vocab_size=VOCAB), 400)
    scores = scores_of(weights, ids)
    r = runner(backend, indexer_graph(), packed_weights(weights, "fp32"), kv=kv)
    made = chosen_by(r, ids)
    check_choice(made, scores, tie)
    assert torch.equal(made, chosen_by(r, ids, (1, 7, 39, 1, 1, 64)))
    assert torch.equal(made, chosen_by(r, ids, (100, 1, 1, 150), DECODE))
    check_choice(chosen_by(runner(ReferenceBackend(), indexer_graph(), weights, kv=kv), ids), scores, tie)


# ---- whole models


def sparse_model(top_k: int):
    """Without experts, whose near ties are unrelated to attention."""
    return random_model(deepseek_v32(first_k_dense_replace=3, index_topk=top_k))


def sparse_runner(backend, model, format_name: str = "fp32", names: list[str] | None = None, **options):
    graph, _ = rules.apply(build_graph(model.config), names)
    return runner(backend, graph, packed_weights(weights_of(model), format_name), **options)


@pytest.mark.parametrize(("top_k", "tokens"), [(16, 1), (16, 17), (16, 257), (40, 600), (300, 1000)])
def test_fp32_equals_transformers(backend, top_k, tokens):
    """None of these rows has a tie, which is rare."""
    model = sparse_model(top_k)
    ids = random_ids(model.config, tokens)
    r, expected = sparse_runner(backend, model), transformers_logits(model, ids)
    assert_close_rows(r.logits(ids), expected)
    assert_close_rows(r.logits(ids, phase=DECODE), expected)
    assert_close_rows(r.logits(ids, chunks=(1, 7, 64, 1, 1)), expected)


@pytest.mark.parametrize("names", [[], ["mla_absorb"], ["qkv", "layer_norm"]], ids=["no-rule", "absorbed", "expanded"])
def test_rules(backend, names):
    model = sparse_model(16)
    ids = random_ids(model.config, 120)
    assert_close_rows(sparse_runner(backend, model, names=names).logits(ids, chunks=(50,)), transformers_logits(model, ids))


@pytest.mark.parametrize("kv", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize("format_name", ["fp32", "int8"])
def test_a_row_does_not_depend_on_the_batch(backend, format_name, kv):
    model = sparse_model(40)
    r = sparse_runner(backend, model, format_name, kv=kv)
    ids = random_ids(model.config, 150)
    alone = r.logits(ids, phase=DECODE)
    assert torch.equal(alone, r.logits(ids, chunks=(1, 30, 5, 40, 1), phase=DECODE))
    others = [r.sequence() for _ in range(3)]
    for other, n in zip(others, (90, 3, 60), strict=True):
        run_step(r.plan, r.store, [Part(other, random_ids(model.config, n, seed=n))])
    mine, rows = r.sequence(), []
    for begin, end in ((0, 30), (30, 33), (33, 34), (34, 150)):
        decoding = [Part(others[0], [5], DECODE), Part(others[1], [7, 8, 9], DECODE), Part(mine, ids[begin:end], DECODE)]
        parts = [*decoding, Part(others[2], random_ids(model.config, 35, seed=begin))]
        rows.append(run_step(r.plan, r.store, parts).logits[4 : 4 + end - begin])
    assert torch.equal(alone, torch.cat(rows))


@pytest.mark.parametrize("kv", ["fp32", "bf16"])
def test_after_a_crop(backend, kv):
    """Below and above top_k: cropped tokens are dropped, including index keys."""
    model = sparse_model(40)
    r = sparse_runner(backend, model, kv=kv)
    ids, other = random_ids(model.config, 120), random_ids(model.config, 120, seed=1)
    for keep in (20, 75):
        blocks = r.sequence()
        run_step(r.plan, r.store, [Part(blocks, ids, DECODE)])
        blocks.crop(keep)
        again = run_step(r.plan, r.store, [Part(blocks, other, DECODE)]).logits
        assert torch.equal(again, r.logits(ids[:keep] + other, phase=DECODE)[keep:])


@pytest.mark.parametrize(("kv", "tolerance"), [("bf16", 4e-2), ("int8", 6e-2)])
def test_error_of_small_caches(backend, kv, tolerance):
    """Mean over rows: rounding can also change the order of close scores, and a row with another token is a different row."""
    model = sparse_model(40)
    ids = random_ids(model.config, 300)
    expected = transformers_logits(model, ids)
    for phase in (DECODE, PREFILL):
        made = sparse_runner(backend, model, kv=kv).logits(ids, phase=phase)
        error = (made - expected).abs().amax(-1) / expected.abs().amax(-1)
        assert error.mean() <= tolerance
        assert error[:40].max() <= tolerance / 2  # rows with full attention
