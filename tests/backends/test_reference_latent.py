"""The reference backend's latent attention, indexer and latent cache: against float64 formulas, and Transformers' choices."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from deepseek_optimizer.backends.reference import ReferenceBackend, int4_rows, latent, ops
from deepseek_optimizer.backends.reference.store import LatentStore, make_store, store_block_bytes
from deepseek_optimizer.errors import BackendError
from deepseek_optimizer.graph import rules
from deepseek_optimizer.graph.ir import LatentSpec
from deepseek_optimizer.models import build_graph
from support.models import CASES, assert_close_rows, random_ids, random_model, transformers_logits, weights_of
from support.steps import Part, run_step, runner
from support.watch import spy

LATENT = [name for name in CASES if name.startswith(("deepseek", "youtu"))]
TIE = 1e-5


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# ---- attention


@pytest.mark.parametrize(("queries", "context"), [(1, 0), (1, 70), (33, 0), (20, 45)])
@pytest.mark.parametrize("sparse", [False, True])
def test_both_forms_of_attention(queries: int, context: int, sparse: bool) -> None:
    """Head by head and row by row, with keys and values in float64."""
    heads, nope, rope, rank, v_dim, keys = 3, 5, 4, 7, 6, queries + context
    q, latents = randn(queries, heads, nope + rope), randn(keys, rank + rope, seed=1)
    kv_b = randn(heads, nope + v_dim, rank, seed=2)
    mask = ops.visible(queries, context, torch.arange(keys))
    if sparse:
        mask &= randn(queries, keys, seed=3) > 0
        mask[torch.arange(queries), context + torch.arange(queries)] = True
    kv = torch.einsum("nr,hvr->nhv", latents[:, :rank], kv_b)
    made = {
        "expanded": latent.attend_expanded(q, kv, latents[:, rank:], mask, 0.3),
        "absorbed": latent.attend_absorbed(q, latents, kv_b, mask, 0.3),
    }
    for h in range(heads):
        k_v = latents[:, :rank].double() @ kv_b[h].double().T
        k = torch.cat((k_v[:, :nope], latents[:, rank:].double()), -1)
        for i in range(queries):
            weight = torch.softmax(0.3 * k[mask[i]] @ q[i, h].double(), 0)
            expected = weight @ k_v[mask[i], nope:]
            for name, out in made.items():
                torch.testing.assert_close(
                    out[i, h].double(), expected, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
                )


def test_latent_row() -> None:
    x, table, weight = randn(5, 12), ops.rope_table(torch.arange(5), torch.tensor([1.0, 0.1]), 1.0), randn(8, seed=1)
    row = latent.latent(x, table, weight, 1e-3, True)
    assert torch.equal(row[:, :8], ops.rms_norm(x[:, :8], weight, 1e-3))
    assert torch.equal(row[:, 8:], ops.rope(x[:, 8:], table, 1, True))


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotated_elements_of_a_head(interleaved: bool) -> None:
    """With an offset, elements before and after are unchanged, and the rotated ones are treated like a separate head."""
    x, table = randn(4, 3 * 11), ops.rope_table(torch.arange(4), torch.tensor([1.0, 0.1]), 1.0)
    y = ops.rope(x, table, 3, interleaved, offset=5).view(4, 3, 11)
    heads = x.view(4, 3, 11)
    assert torch.equal(y[..., :5], heads[..., :5]) and torch.equal(y[..., 9:], heads[..., 9:])
    alone = ops.rope(heads[..., 5:9].flatten(1), table, 3, interleaved)
    assert torch.equal(y[..., 5:9].flatten(1), alone)


def test_layer_norm() -> None:
    x, weight, bias = randn(5, 24), randn(24, seed=1), randn(24, seed=2)
    wide = x.double()
    normed = (wide - wide.mean(-1, keepdim=True)) / (wide.var(-1, correction=0, keepdim=True) + 1e-3).sqrt()
    expected = normed * weight.double() + bias.double()
    torch.testing.assert_close(ops.layer_norm(x, weight, bias, 1e-3).double(), expected, rtol=1e-5, atol=1e-5)


# ---- the indexer


def test_index_scores() -> None:
    q, weights, keys = randn(6, 4, 8), randn(6, 4, seed=1), randn(9, 8, seed=2)
    expected = torch.zeros(6, 9, dtype=torch.float64)
    for i in range(6):
        for t in range(9):
            expected[i, t] = sum(
                weights[i, h].double() * max(0.0, float(q[i, h].double() @ keys[t].double())) for h in range(4)
            )
    torch.testing.assert_close(latent.index_scores(q, weights, keys, 0.25).double(), 0.25 * expected, rtol=1e-4, atol=1e-5)


def test_choosing() -> None:
    scores = torch.tensor([[9.0, 1, 2, 3], [0.0, 5, 5, 9], [-2.0, -1, -3, 9], [1.0, 1, 1, 1]])
    mask = torch.tensor([[1, 0, 0, 0], [1, 1, 1, 0], [1, 1, 1, 0], [1, 1, 1, 1]]).bool()
    chosen = latent.choose(scores, mask, 2)
    assert chosen.tolist() == [[0, -1], [1, 2], [0, 1], [0, 1]]  # invisible tokens are never chosen; of ties, the earlier
    assert latent.choose(scores, mask, 6)[2].tolist() == [0, 1, 2, -1, -1, -1]
    assert torch.equal(latent.chosen_keys(latent.choose(scores, mask, 4), 4), mask)
    assert latent.chosen_keys(chosen, 5).int().tolist() == [[1, 0, 0, 0, 0], [0, 1, 1, 0, 0], [1, 1, 0, 0, 0], [1, 1, 0, 0, 0]]


@pytest.mark.parametrize("case", ["deepseek_v32-indexer", "deepseek_v32-types"])
@pytest.mark.parametrize("chunks", [(), (1, 50, 7)])
def test_chosen_tokens_equal_transformers(case: str, chunks: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """As sets, in every layer and row; scores closer than 1e-5 may be ordered either way."""
    model = random_model(CASES[case]())
    ids, theirs = random_ids(model.config, 150), []
    for layer in model.model.layers:
        layer.self_attn.indexer.register_forward_hook(lambda _, __, output: theirs.append(output[0]))
    transformers_logits(model, ids)
    calls = spy(monkeypatch, latent, "choose")
    runner(ReferenceBackend(), build_graph(model.config), weights_of(model)).logits(ids, chunks=chunks)
    sparse_rows = 0
    for place, (((scores, mask, top_k), _), ours) in enumerate(calls):
        step, layer = divmod(place, len(theirs))
        first = sum(chunks[:step])
        for i, row in enumerate(ours):
            mine = {int(t) for t in row if t >= 0}
            other = {t for t in theirs[layer][first + i].tolist() if mask[i, t : t + 1].any()}
            apart = [float(scores[i, t]) for t in mine ^ other]
            assert not apart or max(apart) - min(apart) < TIE, f"layer {layer}, row {first + i}: {mine ^ other}"
            assert len(mine) == min(top_k, first + i + 1)
            sparse_rows += len(mine) <= first + i
    assert sparse_rows == len(theirs) * (150 - model.config.index_topk)


# ---- the cache

SPEC = LatentSpec(layers=2, rank=200, rope=6, index=10)
TABLE = np.asarray([5, 0, 3], dtype=np.int32)


def filled(kv_dtype: str, spec: LatentSpec = SPEC, tokens: int = 70) -> tuple[LatentStore, torch.Tensor, torch.Tensor]:
    """Layer 1 written in two parts; one group of zeros."""
    store = make_store(spec, kv_dtype, 8, torch.device("cpu"))
    assert isinstance(store, LatentStore)
    rows, keys = randn(tokens, spec.rank + spec.rope), randn(tokens, spec.index, seed=1)
    rows[4, :128] = 0
    table = torch.from_numpy(TABLE).long()
    for part in (slice(0, 33), slice(33, tokens)):
        store.write(1, table, part.start, rows[part])
        if spec.index:
            store.write_index(1, table, part.start, keys[part])
    return store, rows, keys


@pytest.mark.parametrize("kv_dtype", ["fp32", "bf16", "int8", "fp8", "int4"])
def test_reads_what_was_written(kv_dtype: str) -> None:
    store, rows, keys = filled(kv_dtype)
    read, read_keys = store.read(1, TABLE, 70)
    if kv_dtype == "fp32":
        assert torch.equal(read, rows) and torch.equal(read_keys, keys)
        return
    assert torch.equal(read_keys, keys.bfloat16().float())
    if kv_dtype == "int4":
        for group in (slice(0, 128), slice(128, 200)):
            assert torch.equal(read[:, group], int4_rows.dequantized(*int4_rows.quantized(rows[:, group].contiguous())))
        half_step = rows[:, 200:].abs().amax(-1, keepdim=True) / 254
        assert ((read[:, 200:] - rows[:, 200:]).abs() <= half_step * (1 + 1e-5)).all()
        return
    assert torch.equal(read[:, 200:], rows[:, 200:].bfloat16().float())
    if kv_dtype == "bf16":
        assert torch.equal(read, rows.bfloat16().float())
    else:
        for group in (slice(0, 128), slice(128, 200)):  # each with its own scale
            largest, error = rows[:, group].abs().amax(-1, keepdim=True), (read[:, group] - rows[:, group]).abs()
            bound = largest / 254
            if kv_dtype == "fp8":
                bound = torch.maximum(rows[:, group].abs() / 16, largest / 448 / 1024)
            assert (error <= bound * (1 + 1e-5)).all() and (error > 0.9 * bound).any()


def test_no_index_no_keys() -> None:
    store, rows, _ = filled("fp32", LatentSpec(2, 200, 6))
    read, keys = store.read(1, TABLE, 70)
    assert torch.equal(read, rows) and keys is None


@pytest.mark.parametrize("kv_dtype", ["fp32", "int8", "fp8", "int4"])
def test_copied_block_and_released_memory(kv_dtype: str) -> None:
    store, _, _ = filled(kv_dtype)
    before = store.read(1, TABLE, 70)
    store.copy_block(0, 7)
    store.copy_block(5, 1)
    moved = store.read(1, np.asarray([1, 7, 3], dtype=np.int32), 70)
    assert all(torch.equal(a, b) for a, b in zip(moved, before, strict=True))
    store.release(2)
    assert torch.equal(store.read(1, np.asarray([1, 0], dtype=np.int32), 64)[0], before[0][:64])
    with pytest.raises(BackendError, match="never written"):
        store.read(1, TABLE, 70)


@pytest.mark.parametrize("kv_dtype", ["fp32", "bf16", "int8", "fp8", "int4"])
@pytest.mark.parametrize("spec", [SPEC, LatentSpec(3, 128, 64), LatentSpec(1, 130, 2, 4)])
def test_block_bytes_equal_the_size_of_a_block(kv_dtype: str, spec: LatentSpec) -> None:
    store = make_store(spec, kv_dtype, 4, torch.device("cpu"))
    store.copy_block(0, 1)
    taken = sum(t.nbytes for t in (*store._data, *store._scales)) // len(store._data[0])
    assert store.block_bytes == store_block_bytes(spec, kv_dtype) == taken


# ---- whole models


@pytest.mark.parametrize("case", LATENT)
def test_cropped_tokens_are_dropped(case: str) -> None:
    model = random_model(CASES[case]())
    run = runner(ReferenceBackend(), rules.apply(build_graph(model.config))[0], weights_of(model))
    ids, blocks = random_ids(model.config, 90), run.sequence()
    run_step(run.plan, run.store, [Part(blocks, ids)])
    blocks.crop(40)
    again = random_ids(model.config, 15, seed=9)
    output = run_step(run.plan, run.store, [Part(blocks, again)])
    assert_close_rows(output.logits, transformers_logits(model, ids[:40] + again)[40:])


@pytest.mark.parametrize("case", LATENT)
def test_longer_prompts(case: str) -> None:
    model = random_model(CASES[case]())
    ids = random_ids(model.config, 600)
    run = runner(ReferenceBackend(), rules.apply(build_graph(model.config))[0], weights_of(model))
    assert_close_rows(run.logits(ids, chunks=[250, 1]), transformers_logits(model, ids))


@pytest.mark.slow
@pytest.mark.parametrize("case", ["deepseek_v2-groups", "deepseek_v3-groups", "deepseek_v32-indexer", "youtu-tied"])
@pytest.mark.parametrize("fused", [False, True])
def test_the_longest_prompts(case: str, fused: bool) -> None:
    model = random_model(CASES[case]())
    ids, graph = random_ids(model.config, 4096), build_graph(model.config)
    run = runner(ReferenceBackend(), rules.apply(graph)[0] if fused else graph, weights_of(model), blocks=160)
    assert_close_rows(run.logits(ids), transformers_logits(model, ids))


@pytest.mark.parametrize("kv", ["bf16", "int8", "fp8"])
@pytest.mark.parametrize("case", ["deepseek_v2-greedy", "youtu-tied"])
def test_smaller_caches_stay_close(case: str, kv: str) -> None:
    model = random_model(CASES[case]())
    ids = random_ids(model.config, 200)
    run = runner(ReferenceBackend(), rules.apply(build_graph(model.config))[0], weights_of(model), kv=kv)
    logits, expected = run.logits(ids, chunks=[77]), transformers_logits(model, ids)
    error = ((logits - expected).abs().amax(-1) / expected.abs().amax(-1)).median()
    assert 1e-4 < error < 0.05  # a row whose experts change through rounding may have a larger error


def test_the_last_hidden_state() -> None:
    model = random_model(CASES["deepseek_v3-groups"]())
    ids = random_ids(model.config, 40)
    for graph in (build_graph(model.config), rules.apply(build_graph(model.config))[0]):
        run = runner(ReferenceBackend(), graph, weights_of(model))
        whole = run.hidden(ids)
        output = run_step(run.plan, run.store, [Part(run.sequence(), ids, rows=[39])], last_hidden=True)
        assert torch.equal(output.last_hidden, whole[-1]) and output.hidden is None
        assert run_step(run.plan, run.store, [Part(run.sequence(), ids)]).last_hidden is None
