"""LoRA adapters: products of single kernels, steps whose sequences have several adapters, captured steps, and an engine."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from support import triton_interpreter

triton_interpreter.require()

from deepseek_optimizer import Request, SamplingParams, load_model, make_engine
from deepseek_optimizer.backends import cuda
from deepseek_optimizer.backends.base import DECODE, PREFILL
from deepseek_optimizer.backends.cuda.adapters import CudaAdapters
from deepseek_optimizer.backends.cuda.backend import CudaBackend
from deepseek_optimizer.backends.cuda.kernels import adapters
from deepseek_optimizer.backends.cuda.step import StepIntegers
from deepseek_optimizer.backends.reference import ReferenceBackend
from deepseek_optimizer.errors import BackendError
from deepseek_optimizer.graph import rules
from deepseek_optimizer.graph.adapters import UNFUSED, with_adapters
from deepseek_optimizer.graph.ir import NO_CACHE, AdapterSite, Graph
from deepseek_optimizer.models import build_graph
from support import family_configs as configs
from support.encoders import make_batch as whole_sequences
from support.lora import random_adapter
from support.models import assert_close_rows, random_ids, random_model, weights_of
from support.recording_device import RecordingDevice
from support.steps import Part, make_batch, runner

from ..cpu.packing import packed_weights
from .plans import FORMAT_TOLERANCE
from .test_captured import TINY
from .values import random

CPU = torch.device("cpu")
RANK = 6


@pytest.mark.parametrize(
    ("columns", "outputs", "ranks", "dtype"),
    [(70, 35, (5, 1), "fp32"), (1100, 70, (20, 17), "bf16"), (33, 20, (70, 3), "fp32")],
)
def test_products(columns, outputs, ranks, dtype):
    """Of 37 rows with adapters of two ranks, one without matrices for this product, and none; with two splits of the columns,
    and ranks that are added one part after the other."""
    graph = Graph("", [], 0, 0, 0, NO_CACHE, 0, adapter_sites=(AdapterSite("a", 9, 9), AdapterSite("b", columns, outputs)))
    store = CudaAdapters(graph, 3, max(ranks), dtype, CPU)
    pairs = [(random(r, columns, seed=r) * columns**-0.5, random(outputs, r, seed=r + 1)) for r in ranks]
    for slot, pair in enumerate(pairs):
        store.load(slot, {1: pair})
    assert store.adapter_bytes({1: ranks[0]}) == store._held[0][0].nbytes + store._held[0][1].nbytes
    slots, lengths = [1, 0, -1, 2, 1], [1, 20, 3, 4, 9]
    batch = whole_sequences(random(37, columns), lengths)
    batch.adapter_of = np.array(slots, np.int32)
    integers = StepIntegers.of(batch, 1, 16, slots_of_adapters=3)
    memory = torch.empty(integers.size, dtype=torch.int32)
    integers.write(memory.numpy())
    rows, y = integers.on(memory).adapters, random(37, outputs, seed=9)
    assert len(rows.fields) == 4 and rows.fields[:, 2].sum() == 34
    h, made = torch.full((37, max(ranks)), torch.nan), y.clone()
    adapters.shrink(batch.states, rows.order, rows.fields, store.table, 1, dtype == "bf16", h)
    adapters.expand(h, rows.order, rows.fields, store.table, 1, dtype == "bf16", made)
    begin = 0
    for slot, length in zip(slots, lengths, strict=True):
        own, begin = slice(begin, begin + length), begin + length
        if slot in (0, 1):
            down, up = pairs[slot]
            added = batch.states[own] @ down.T @ up.T
            tolerance = (2**-6 if dtype == "bf16" else 1e-5) * added.abs().max()
            assert ((made - y)[own] - added).abs().max() <= tolerance
        else:
            assert torch.equal(made[own], y[own])


@pytest.fixture(scope="module")
def model():
    return random_model(configs.llama(**TINY))


def graph_of(model):
    names = [name for name in rules.RULES if name not in UNFUSED]
    return with_adapters(rules.apply(build_graph(model.config), names)[0], RANK)


def pairs_of(graph, seed, rank=RANK):
    """Random matrices for all products but those of latents."""
    made = {}
    for index, site in enumerate(graph.adapter_sites):
        if site.latent is None:
            down, up = (random(*shape, seed=100 * seed + index) for shape in site.pair_shapes(rank))
            made[index] = 0.3 * down, 0.3 * up
    return made


def loaded(backend, graph):
    """Two adapters, of which one leaves out every third product, and an empty slot."""
    store = backend.new_adapters(graph, 3, RANK, "fp32")
    store.load(0, pairs_of(graph, 1))
    store.load(1, {site: pair for site, pair in pairs_of(graph, 2, 3).items() if site % 3})
    return store


def steps(run, store, model):
    """The logits of a step of prompts and of two of decoding, in which slots are other ones."""
    sequences = [run.sequence() for _ in range(5)]
    prompts = [random_ids(model.config, count, seed) for seed, count in enumerate((5, 3, 18, 2, 1))]
    for ids, phase, slots in (
        (prompts, PREFILL, [1, -1, 0, 1, 2]), ([[3]] * 5, DECODE, [0, 0, -1, 1, 1]), ([[4]] * 5, DECODE, [-1, 0, 0, 0, 1]),
        ([[5]] * 5, DECODE, [1, 1, 1, -1, 2]),
    ):  # fmt: skip
        parts = [Part(blocks, own, phase) for blocks, own in zip(sequences, ids, strict=True)]
        batch = make_batch(parts, run.store, adapters=store, adapter_of=np.array(slots, np.int32))
        yield run.plan.run(batch, run.store).logits.clone()


def test_steps_with_several_adapters(model):
    """Also of captured steps: their slots differ, and one step has an adapter that was replaced."""
    graph, weights, device, results = graph_of(model), packed_weights(weights_of(model), "fp32"), RecordingDevice(), []
    for backend in (CudaBackend(CPU, True, device), ReferenceBackend()):
        run, store, logits = runner(backend, graph, weights, blocks=12), loaded(backend, graph), []
        for i, rows in enumerate(steps(run, store, model)):
            logits.append(rows)
            if i == 2:
                store.clear(1)
                store.load(1, pairs_of(graph, 3))
        results.append(torch.cat(logits))
    assert_close_rows(*results, FORMAT_TOLERANCE["fp32"])
    assert device.events.count("capture") == 1 and device.events.count("replay 0") == 2


def test_rows_without_adapters_have_the_bits_of_a_plan_that_supports_none(model):
    graph, weights, backend = graph_of(model), packed_weights(weights_of(model), "int8"), CudaBackend(CPU)
    run, ids = runner(backend, graph, weights, blocks=12), random_ids(model.config, 3)
    plain = runner(backend, rules.apply(build_graph(model.config), [n for n in rules.RULES if n not in UNFUSED])[0], weights)
    store, expected = loaded(backend, graph), plain.logits(ids)
    assert torch.equal(run.logits(ids), expected)
    parts = [Part(run.sequence(), ids) for _ in range(3)]
    batch = make_batch(parts, run.store, adapters=store, adapter_of=np.array([-1, 0, 2], np.int32))
    made = run.plan.run(batch, run.store).logits.split(3)
    alone = run.plan.run(replace(batch, adapter_of=None), run.store).logits.split(3)
    assert [torch.equal(*rows) for rows in zip(made, alone, strict=True)] == [True, False, True]


def test_what_is_refused(model):
    graph, backend = graph_of(model), CudaBackend(CPU)
    run = runner(backend, graph, packed_weights(weights_of(model), "fp32"), blocks=4)
    other = ReferenceBackend().new_adapters(graph, 1, RANK, "fp32")
    batch = make_batch([Part(run.sequence(), [1])], run.store, adapters=other, adapter_of=np.zeros(1, np.int32))
    with pytest.raises(BackendError, match=r"step.adapters: the plan needs a CudaAdapters of its backend, got a Reference"):
        run.plan.run(batch, run.store)
    store = backend.new_adapters(graph, 1, RANK, "fp32")
    with pytest.raises(ValueError, match="an adapter's matrices are"):
        store.load(0, pairs_of(graph, 1, RANK + 1))
    assert not store.table.any()


def test_adapters_of_latent_attention_are_refused():
    """The others of such a model are loaded."""
    fields = {name: value for name, value in TINY.items() if name != "head_dim"} | {"num_key_value_heads": 2}
    graph, store = graph_of(random_model(configs.deepseek_v3(**fields, n_routed_experts=6, num_experts_per_tok=2))), None
    store = CudaBackend(CPU).new_adapters(graph, 1, RANK, "fp32")
    store.load(0, pairs_of(graph, 1))
    latent = next(index for index, site in enumerate(graph.adapter_sites) if site.latent is not None)
    pair = tuple(torch.zeros(shape) for shape in graph.adapter_sites[latent].pair_shapes(1))
    with pytest.raises(BackendError, match=r"adapters of latent attention's 'model.layers.0.self_attn.kv_b_proj' yet; leave"):
        store.load(0, {latent: pair})


def test_an_engine(tiny_model, tmp_path, monkeypatch):
    """Requests with two adapters and without one, in the same steps, have the tokens of the reference backend."""
    spec = replace(cuda.SPEC, device_types=("cpu",), create=lambda where, settings: CudaBackend(where, True, RecordingDevice()))
    monkeypatch.setattr(cuda, "SPEC", spec)
    answers, folders = [], {}
    for backend in ("reference", "cuda"):
        model = load_model(tiny_model, backend=backend, kv_cache_memory=1 << 20)
        for seed, name in enumerate(("a", "b")):
            if not (tmp_path / name).exists():
                folders[name] = random_adapter(model, tmp_path / name, seed=seed, size=0.5)
        engine = make_engine(model, adapters=folders, max_lora_rank=4, lora_dtype="fp32", drafts=False)
        sampling = SamplingParams(temperature=0, max_tokens=2, ignore_eos=True)
        requests = [Request([5 + i], sampling, adapter=name) for i, name in enumerate(("a", "", "b", "a"))]
        answers.append([answer.token_ids for answer in engine.generate(requests)])
    assert answers[0] == answers[1] and len({tuple(ids) for ids in answers[0]}) > 1
