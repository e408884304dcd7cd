"""Bytes and operations counted by hand, the machine's measured speeds, and energy counters as Linux reports them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from transformers import AutoModelForCausalLM, GPTNeoXConfig

from deepseek_optimizer import DeepSeekConfig, DynamicGraphOptimizer
from deepseek_optimizer.backends import cpu
from deepseek_optimizer.bench import machine_limits, roofline
from deepseek_optimizer.bench.energy import Energy
from deepseek_optimizer.bench.machine_limits import matrix_tera, read_gb_s, read_regions_gb_s
from deepseek_optimizer.bench.memory_traffic import Experts, Reads, Traffic, matrix_memory, traffic_of
from deepseek_optimizer.bench.roofline import Roofline
from deepseek_optimizer.bench.sides.model import sample_of
from deepseek_optimizer.bench.work import Work
from deepseek_optimizer.graph.attention_mode import spans_of_layers
from support.models import CASES, random_model

HIDDEN, INNER, LAYERS, KV = 64, 128, 2, 32  # of the tiny model
WEIGHTS = LAYERS * (2 * HIDDEN * HIDDEN + 2 * HIDDEN * KV + 3 * HIDDEN * INNER)


def test_traffic_of_a_plain_model(plain):
    head = HIDDEN * plain.config.vocab_size
    assert traffic_of(plain) == Traffic((WEIGHTS + head) * 4, 2 * LAYERS * KV * 4, WEIGHTS, head, LAYERS * HIDDEN)


@pytest.mark.skipif(cpu.unavailable_reason() is not None, reason="needs the native backend")
def test_traffic_of_an_optimized_model(optimized, plain):
    actual, floats = traffic_of(optimized), traffic_of(plain)
    tiles = LAYERS * (2 * 4 * 2 + 2 * 2 * 2 + 2 * 8 * 2 + 4 * 4) + -(-plain.config.vocab_size // 16) * 2
    assert actual.weight_bytes == tiles * 544  # int8 tiles of 16 x 32; the tied embedding is read as the head
    assert actual.kv_bytes == optimized.report().kv_block_bytes / 32 >= 2 * LAYERS * KV * 2  # heads of 16 are padded
    assert (actual.weights, actual.head_weights) == (floats.weights, floats.head_weights)


def test_traffic_of_sparse_attention():
    model = random_model(CASES["deepseek_v32-indexer"]())
    plain = traffic_of(model)
    actual = traffic_of(DynamicGraphOptimizer(model, config=DeepSeekConfig(backend="reference")).optimize())
    latents, index = (3 * 4 * n for n in (40 + 12, 24))  # layers x bytes x elements
    assert (plain.kv_bytes, plain.chosen_bytes) == (latents + index, 0)
    assert (actual.kv_bytes, actual.chosen_bytes, actual.top_k) == (index, latents, 16)


@pytest.mark.parametrize("backend", ("reference", "cpu"))
def test_traffic_of_recurrent_and_windowed_layers(backend):
    if backend == "cpu" and cpu.unavailable_reason() is not None:
        pytest.skip("needs the native backend")
    settings = DeepSeekConfig(backend=backend, kv_cache="fp32")
    recurrent = DynamicGraphOptimizer(random_model(CASES["qwen3_5_text-mixed"]()), config=settings).optimize()
    graph = recurrent.dso.graph
    actual = traffic_of(recurrent)
    assert actual.state_bytes == recurrent.dso.backend.state_bytes(graph) >= 4 * sum(s.elements for s in graph.states) > 0
    assert not actual.windows
    sliding = DynamicGraphOptimizer(random_model(CASES["gemma3_text-two-ropes"]()), config=settings).optimize()
    cache, spans = sliding.dso.graph.cache, spans_of_layers(sliding.dso.graph)
    actual, floats = traffic_of(sliding), traffic_of(random_model(CASES["gemma3_text-two-ropes"]()))
    windowed = [layer for layer, span in spans.items() if span is not None]
    assert 0 < len(windowed) < cache.layers and cache.groups > 1
    ((size, tokens),) = actual.windows
    elements = 4 * sum(map(cache.elements_of, windowed))
    padded = size / elements  # native caches pad the heads
    assert tokens == spans[windowed[0]][0] and (padded == 1 or (backend == "cpu" and 1 < padded < 1.5))
    assert actual.kv_bytes + size == pytest.approx(floats.kv_bytes * padded)


def test_traffic_of_compressed_attention():
    settings = DeepSeekConfig(backend="reference", kv_cache="fp32")
    actual = traffic_of(DynamicGraphOptimizer(random_model(CASES["deepseek_v4-mixed"]()), config=settings).optimize())
    # Of a block of 32 tokens, whose rows of one kind are padded to 64 bytes: 11 rows of 3 tokens each, 5 of 7
    row, sparse, heavy, index = 4 * 20, 896 / 11, 448 / 5, 576 / 11
    assert actual.kv_bytes == pytest.approx(2 * index / 3 + heavy / 7)  # two sparse layers, one heavily compressed
    chosen = [(row, 21), (pytest.approx(sparse / 3), 3 * 9)]
    assert list(actual.windows) == [*chosen, (row, 21), (row, 21), *chosen]


def test_bytes_and_operations():
    traffic = Traffic(weight_bytes=1000, kv_bytes=10, weights=100, head_weights=7, attention_width=3)
    work = Work(prompt=4, new=2, depth=5, batch=2)
    assert traffic.step_bytes(work) == 1000 + 2 * 10 * (5 + 4 + 1)
    assert traffic.token_bytes(work) == 600
    sparse = Traffic(1000, 10, 100, 7, 3, chosen_bytes=5, top_k=8)
    assert sparse.step_bytes(work) == 1000 + 2 * (10 * 10 + 5 * 8)
    assert sparse.step_bytes(Work(prompt=2, new=2)) == 1000 + 10 * 3 + 5 * 3
    windowed = replace(traffic, windows=((5.0, 8), (7.0, 4)), state_bytes=100)
    assert windowed.step_bytes(work) == 1000 + 2 * (10 * 10 + 5 * 8 + 7 * 4 + 100)
    pairs = 6 + 7 + 8 + 9  # each prompt token attends to the cache and the prompt up to itself
    assert traffic.prefill_operations(work) == 2 * (2 * 100 * 4 + 2 * 7 + 4 * 3 * pairs)
    assert sparse.prefill_operations(work) == 2 * (2 * 100 * 4 + 2 * 7 + 4 * 3 * (6 + 7 + 8 + 8))


def test_shares(monkeypatch):
    measured = []
    monkeypatch.setattr(roofline, "read_gb_s", lambda size, threads: measured.append((size, threads)) or 50.0)
    monkeypatch.setattr(roofline, "matrix_tera", lambda threads: {"fp32": 0.5, "int8": 2.0})
    traffic, work = Traffic(10**8, 0, 10**8, 0, 0), Work(100, 10)
    roof = Roofline(3)
    for _ in range(2):
        share = roof.share(traffic, work, ttft_ms=100, decode_tok_s=250)
    assert measured == [(10**8, 3)]
    assert share["read_gb_s"] == pytest.approx(25) and share["bandwidth_percent"] == pytest.approx(50)
    assert share["prefill_tera"] == pytest.approx(0.2) and share["matrix_percent"] == pytest.approx(10)
    assert "int8" in share["matrix_percent_of"]
    assert "bandwidth_percent" not in roof.share(traffic, work, 100, None)


@pytest.mark.skipif(cpu.unavailable_reason() is not None, reason="needs the native backend")
def test_bandwidth_of_the_models_own_matrices(optimized, plain, monkeypatch):
    regions = matrix_memory(optimized)
    assert sum(size for _, size in regions) == traffic_of(optimized).weight_bytes
    assert matrix_memory(plain) == [] and sample_of(regions) == regions
    assert sample_of([(0, 1 << 30), (5 << 30, 3 << 30)]) == [(0, 128 << 20), (5 << 30, 384 << 20)]
    memory = np.ones(1 << 21, np.uint8)
    halves = [(memory.ctypes.data, 1 << 20), (memory.ctypes.data + (1 << 20), 1 << 20)]
    assert 0.1 < read_regions_gb_s(halves, 2, seconds=0.05) < 10_000
    assert read_regions_gb_s(regions, 2, seconds=0.05) is None  # too small to tell
    monkeypatch.setattr(roofline, "matrix_tera", lambda threads: {"fp32": 0.5})
    monkeypatch.setattr(roofline, "read_regions_gb_s", lambda regions, threads: 50.0 if regions == halves else None)
    share = Roofline(2, halves).share(Traffic(10**8, 0, 10**8, 0, 0), Work(100, 10), ttft_ms=100, decode_tok_s=250)
    assert share["machine_read_gb_s"] == 50 and share["bandwidth_percent"] == pytest.approx(50)


def test_machine_limits_are_measured():
    for threads in (1, 2):
        assert 0.1 < read_gb_s(4 << 20, threads, seconds=0.05) < 10_000
        assert 0.1 < machine_limits._numpy_read_gb_s(4 << 20, threads, seconds=0.05) < 10_000
    actual = matrix_tera(1, size=256, seconds=0.02)
    assert actual["fp32"] > 1e-4 and all(v > 0 for v in actual.values())


def _domain(root, name, used, top=1000):
    (root / name).mkdir()
    (root / name / "energy_uj").write_text(f"{used}\n")
    (root / name / "max_energy_range_uj").write_text(f"{top}\n")


def test_energy_sums_packages_and_handles_counter_wrap(tmp_path):
    _domain(tmp_path, "intel-rapl:0", 900)
    _domain(tmp_path, "intel-rapl:1", 100)
    _domain(tmp_path, "intel-rapl:0:0", 5)
    _domain(tmp_path, "intel-rapl-mmio:0", 5)
    energy = Energy(tmp_path)
    (tmp_path / "intel-rapl:0" / "energy_uj").write_text("99")  # the counter wraps at 1000: 100 + 1 + 99
    (tmp_path / "intel-rapl:1" / "energy_uj").write_text("150")
    (tmp_path / "intel-rapl:0:0" / "energy_uj").write_text("77")
    assert energy.joules == pytest.approx((200 + 50) / 1e6)
    assert energy.watts > 0


def test_energy_that_cannot_be_read_is_none(tmp_path):
    assert Energy(tmp_path / "missing").joules is None
    _domain(tmp_path, "intel-rapl:0", 1)
    energy = Energy(tmp_path)
    (tmp_path / "intel-rapl:0" / "energy_uj").unlink()
    assert energy.joules is None and energy.watts is None


def test_a_step_reads_only_chosen_experts():
    reads = Reads(100, 0, experts=(Experts(6400, 64, 6),))
    assert reads.step_bytes(Work(1, 1)) == pytest.approx(100 + 600)
    both = 6400 * (1 - (58 / 64) ** 2)  # two tokens have some experts in common
    assert reads.step_bytes(Work(1, 1, batch=2)) == pytest.approx(100 + both)


def test_traffic_of_an_unsupported_family():
    model = AutoModelForCausalLM.from_config(GPTNeoXConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, vocab_size=50,
    ))  # fmt: skip
    layer = 32 * 3 * 32 + 32 * 32 + 2 * 32 * 64
    actual = traffic_of(model)
    assert (actual.weights, actual.head_weights) == (2 * layer, 32 * 50)
    assert actual.weight_bytes == 4 * (actual.weights + actual.head_weights)
