"""LoRA adapters in plans of both backends: PEFT's logits for every sequence of a step, whatever the others use."""

from __future__ import annotations

import gc
import mmap
import weakref

import numpy as np
import pytest
import torch

from deepseek_optimizer.backends.base import DECODE, PREFILL
from deepseek_optimizer.backends.cpu import CpuBackend, lower, unavailable_reason
from deepseek_optimizer.backends.reference import ReferenceBackend
from deepseek_optimizer.errors import BackendError
from deepseek_optimizer.graph import rules
from deepseek_optimizer.graph.adapters import UNFUSED, with_adapters
from deepseek_optimizer.graph.attention_mode import AttentionMode, apply_mode
from deepseek_optimizer.graph.validate import check_graph
from deepseek_optimizer.integration.load.lora import read_adapter
from deepseek_optimizer.models import build_graph
from support.lora import adapted, logits_of, save_adapter
from support.models import CASES, assert_close_rows, random_ids, random_model, weights_of
from support.steps import Part, make_batch, runner

from .cpu.packing import dequantized, packed_weights

RANK = 8


def backends():
    made = [ReferenceBackend()]
    return made if unavailable_reason() else [*made, CpuBackend(threads=2)]


def graph_of(model):
    return with_adapters(rules.apply(build_graph(model.config), [n for n in rules.RULES if n not in UNFUSED])[0], RANK)


def step(made, store, sequences, prompts, slots, phase=PREFILL):
    parts = [Part(blocks, ids, phase) for blocks, ids in zip(sequences, prompts, strict=True)]
    batch = make_batch(parts, made.store, adapters=store, adapter_of=np.array(slots, np.int32))
    return made.plan.run(batch, made.store).logits.split([len(ids) for ids in prompts])


@pytest.mark.parametrize("case", CASES)
def test_every_sequence_has_the_logits_of_peft(case, tmp_path):
    model = random_model(CASES[case]())
    graph = graph_of(model)
    check_graph(graph)
    modules = sorted({site.module for site in graph.adapter_sites})
    if hasattr(model.config, "num_experts_per_tok"):  # PEFT would adapt experts along with an MLP's modules
        modules = [name for name in modules if "attn" in name or ".conv." in name]
    folders = [
        save_adapter(model, tmp_path / "a", seed=1, targets=modules),
        save_adapter(model, tmp_path / "b", seed=2, targets=modules[::3], r=7, use_rslora=True),
    ]
    slots, prompts = [1, -1, 0, 1, 2], [random_ids(model.config, n, seed=n) for n in (5, 40, 33, 3, 4)]
    by_slot = {0: adapted(model, folders[0]), 1: adapted(model, folders[1]), -1: model, 2: model}
    expected = [logits_of(by_slot[slot], ids) for slot, ids in zip(slots, prompts, strict=True)]
    packed = packed_weights(weights_of(model), "fp32")
    for backend in backends():
        made = runner(backend, graph, packed if backend.name == "cpu" else weights_of(model))
        store = backend.new_adapters(graph, 3, RANK, "fp32")  # slot 2 stays empty
        for slot, folder in enumerate(folders):
            store.load(slot, read_adapter(folder, graph, RANK).pairs)
        logits = step(made, store, [made.sequence() for _ in slots], prompts, slots)
        for rows, wanted in zip(logits, expected, strict=True):
            assert_close_rows(rows, wanted)
        # In decode phase, after a prefix with the same adapter.
        sequences = [made.sequence() for _ in slots]
        step(made, store, sequences, [ids[:-2] for ids in prompts], slots)
        for place in (-2, -1):
            rows = step(made, store, sequences, [[ids[place]] for ids in prompts], slots, DECODE)
            for row, wanted in zip(rows, expected, strict=True):
                assert_close_rows(row, wanted[[place]])


def test_a_plan_without_adapters_in_a_step_has_the_bits_of_one_that_supports_none(tmp_path):
    """Also if its matrices are packed, and if the same rows were adapted in the step before."""
    model = random_model(CASES["llama-biases"]())
    plain, ids = rules.apply(build_graph(model.config))[0], random_ids(model.config, 37)
    graph, folder = graph_of(model), save_adapter(model, tmp_path / "a")
    for backend in backends():
        for format_name in ("fp32", "bf16", "fp8", "int8", "int4", "q4_1") if backend.name == "cpu" else ("fp32",):
            weights = packed_weights(weights_of(model), format_name)
            weights = weights if backend.name == "cpu" else dequantized(weights)
            expected, made = runner(backend, plain, weights).logits(ids), runner(backend, graph, weights)
            store = backend.new_adapters(graph, 1, RANK, "bf16")
            store.load(0, read_adapter(folder, graph, RANK).pairs)
            other = step(made, store, [made.sequence()], [ids], [0])[0]
            assert not torch.equal(other, expected)
            assert torch.equal(made.logits(ids), expected)
            assert torch.equal(step(made, store, [made.sequence()], [ids], [-1])[0], expected)
            store.clear(0)
            assert torch.equal(step(made, store, [made.sequence()], [ids], [0])[0], expected)


def test_packed_matrices_with_adapters(tmp_path):
    """Each product equals that of the dequantized matrix plus the adapter's. With int4, the adapter too reads rows of int8."""
    if unavailable_reason():
        pytest.skip("needs the native backend")
    model = random_model(CASES["llama-gqa"]())
    graph, folder, ids = graph_of(model), save_adapter(model, tmp_path / "a"), random_ids(model.config, 50)
    cpu = CpuBackend(threads=2)
    for format_name, tolerance in (("int4", 6e-2), ("int8", 1e-3), ("bf16", 2e-2), ("fp8", 2e-2)):
        weights = packed_weights(weights_of(model), format_name)
        results = []
        for backend, own in ((cpu, weights), (ReferenceBackend(rounding="format"), weights)):
            made, store = runner(backend, graph, own), backend.new_adapters(graph, 1, RANK, "bf16")
            store.load(0, read_adapter(folder, graph, RANK).pairs)
            results.append(step(made, store, [made.sequence()], [ids], [0])[0])
        assert_close_rows(*results, tolerance)


@pytest.mark.parametrize("case", ["llama-biases", "deepseek_v3-groups"])
def test_products_with_adapters_have_the_bits_of_separate_steps(case, tmp_path, monkeypatch):
    if unavailable_reason():
        pytest.skip("needs the native backend")
    model = random_model(CASES[case]())
    graph, folder = graph_of(model), save_adapter(model, tmp_path / "a", targets=["q_proj", "v_proj", "o_proj", "kv_b_proj"])
    backend, ids = CpuBackend(threads=2), random_ids(model.config, 40)
    for format_name in ("fp32",):  # with others, separate steps read rows that are not rounded
        weights, results = packed_weights(weights_of(model), format_name), []
        for merged in (True, False):
            if not merged:
                monkeypatch.setattr(lower, "with_low_rank_parts", lambda nodes, format_of: nodes)
            made, store = runner(backend, graph, weights), backend.new_adapters(graph, 1, RANK, "fp32")
            store.load(0, read_adapter(folder, graph, RANK).pairs)
            results.append(step(made, store, [made.sequence()], [ids], [0])[0])
            ops = {row["op"] for row in made.plan.describe()}
            assert ("lora_up" in ops) == (not merged or case.startswith("deepseek")) and "lora_down" in ops
            assert ("swiglu" in ops) == (not merged)
        monkeypatch.undo()
        assert torch.equal(*results)


@pytest.mark.parametrize("mode", ["sliding", "sparse"])
def test_attention_modes_of_latents(mode, tmp_path):
    """A window or a budget that covers all tokens gives the logits of PEFT."""
    model = random_model(CASES["deepseek_v3-groups"]())
    plain, folder = graph_of(model), save_adapter(model, tmp_path / "a", targets=["q_b_proj", "kv_b_proj"])
    kinds = {"sliding": AttentionMode("sliding", window=256), "sparse": AttentionMode("sparse", window=32, budget=256)}
    names = [n for n in rules.RULES if n not in UNFUSED]
    graph = with_adapters(apply_mode(rules.apply(build_graph(model.config), names)[0], kinds[mode])[0], RANK)
    assert len(graph.adapter_sites) == len(plain.adapter_sites)
    ids = random_ids(model.config, 90)
    for backend in backends():
        weights = weights_of(model) if backend.name != "cpu" else packed_weights(weights_of(model), "fp32")
        made, store = runner(backend, graph, weights), backend.new_adapters(graph, 1, RANK, "fp32")
        store.load(0, read_adapter(folder, graph, RANK).pairs)
        logits = step(made, store, [made.sequence()], [ids], [0])[0]
        assert_close_rows(logits, logits_of(adapted(model, folder), ids))


def test_an_adapter_is_one_mapping(tmp_path):
    """Its matrices are consecutive, in the order of the sites, and its memory is released with it."""
    if unavailable_reason():
        pytest.skip("no native library")
    graph = graph_of(random_model(CASES["llama-gqa"]()))
    store = CpuBackend(threads=1).new_adapters(graph, 2, RANK, "bf16")
    shapes = [site.pair_shapes(RANK) for site in graph.adapter_sites]
    store.load(1, {n: (torch.ones(down), torch.ones(up)) for n, (down, up) in enumerate(shapes)})
    tiles = [matrix for n in range(len(shapes)) for matrix in store._held[1][n]]
    starts = [matrix.data_ptr() for matrix in tiles]
    assert starts[0] % mmap.PAGESIZE == 0 and store.adapter_bytes(dict.fromkeys(range(len(shapes)), RANK)) == sum(
        matrix.nbytes for matrix in tiles
    )
    assert starts == [starts[0] + sum(matrix.nbytes for matrix in tiles[:n]) for n in range(len(tiles))]
    storage = weakref.ref(tiles[0].untyped_storage())
    del tiles
    store.clear(1)
    gc.collect()
    assert storage() is None


def test_matrices_that_do_not_fit(tmp_path):
    model = random_model(CASES["llama-gqa"]())
    graph = graph_of(model)
    site = graph.adapter_sites[0]
    for backend in backends():
        store = backend.new_adapters(graph, 1, RANK, "fp32")
        for down, up in (
            ((RANK + 1, site.inputs), (site.outputs, RANK + 1)),
            ((2, site.inputs + 1), (site.outputs, 2)),
            ((2, site.inputs), (site.outputs + 1, 2)),
            ((2, site.inputs), (site.outputs, 3)),
        ):
            with pytest.raises(ValueError):
                store.load(0, {0: (torch.ones(down), torch.ones(up))})
        small, large = (store.adapter_bytes({0: rank}) for rank in (1, RANK))
        assert 0 < small < large
        made = runner(backend, graph, weights_of(model) if backend.name != "cpu" else packed_weights(weights_of(model), "fp32"))
        with pytest.raises((ValueError, BackendError), match="adapter_of"):
            step(made, store, [made.sequence()], [[1, 2]], [1])
