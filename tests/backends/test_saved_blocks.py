"""A block exported from one store and imported into another reads back bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from deepseek_optimizer.backends.cpu import CpuBackend, unavailable_reason
from deepseek_optimizer.backends.reference import ReferenceBackend
from deepseek_optimizer.errors import BackendError
from deepseek_optimizer.graph import rules
from deepseek_optimizer.models import build_graph
from support.models import CASES, random_model, weights_of
from support.steps import Part, run_step, runner

BACKENDS = [
    "reference",
    pytest.param("cpu", marks=pytest.mark.skipif(unavailable_reason() is not None, reason="no native build")),
]


def ready(backend: str, case: str, kv_dtype: str):
    model = random_model(CASES[case]())
    graph, _ = rules.apply(build_graph(model.config), None)
    made = CpuBackend(threads=2) if backend == "cpu" else ReferenceBackend("cpu")
    if backend == "cpu":
        from .cpu.packing import packed_weights

        weights = packed_weights(weights_of(model), "fp32")
    else:
        weights = weights_of(model)
    return made, graph, runner(made, graph, weights, blocks=8, kv=kv_dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kv_dtype", ["fp32", "bf16", "int8", "fp8", "int4"])
@pytest.mark.parametrize("case", ["llama-gqa", "deepseek_v3-groups", "deepseek_v32-indexer"])
def test_blocks_of_one_store_are_valid_in_another(backend, case, kv_dtype):
    if backend == "cpu" and kv_dtype == "fp8":
        pytest.skip("the cpu backend has no cache in fp8")
    made, graph, first = ready(backend, case, kv_dtype)
    sequence = first.sequence()
    ids = [int(i) for i in np.random.default_rng(3).integers(0, graph.vocab_size, 64)]
    run_step(first.plan, first.store, [Part(sequence, ids)])
    other = made.new_store(graph, kv_dtype, 8)
    targets = [6, 1]
    for source, target in zip(sequence.table().tolist(), targets, strict=True):
        data = first.store.read_block(source)
        assert len(data) == first.store.saved_bytes == other.saved_bytes
        other.write_block(target, data)
        assert other.read_block(target) == data
    for layer in range(graph.cache.layers):
        there = other.read(layer, np.array(targets, np.int32), 64)
        for a, b in zip(first.store.read(layer, sequence.table(), 64), there, strict=True):
            assert (a is None and b is None) or torch.equal(a, b)


@pytest.mark.parametrize("backend", BACKENDS)
def test_bytes_of_the_wrong_size_are_rejected(backend):
    _, _, made = ready(backend, "llama-gqa", "bf16")
    store = made.store
    store.write_block(0, bytes(store.saved_bytes))
    before = store.read_block(0)
    for data in (b"", before + b"x", before[:-1]):
        with pytest.raises(ValueError, match="bytes"):
            store.write_block(0, data)
    for call in (lambda: store.read_block(8), lambda: store.write_block(8, before)):
        with pytest.raises((BackendError, ValueError), match="block 8"):
            call()
    assert store.read_block(0) == before
