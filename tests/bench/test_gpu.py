"""`make bench-gpu` without a card: what is measured, computed and written, with sides that only take time."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from benchmarks import gpu

import deepseek_optimizer
from deepseek_optimizer.errors import ConfigError

MILLISECOND = 1e-3


class _Clock:
    now = 0.0

    def __call__(self):
        return self.now


class _Side:
    """A prompt takes `prompt` ms, and each further token `token` ms."""

    def __init__(self, clock, prompt, token):
        self.clock, self.prompt, self.token = clock, prompt, token

    def generate(self, prompts, tokens):
        self.clock.now += (self.prompt + (tokens - 1) * self.token) * MILLISECOND


def test_speeds_and_ratios():
    clock = _Clock()
    sides = {"ours int4": _Side(clock, 20, 1.0), "vllm": _Side(clock, 10, 2.0)}
    found = gpu.measure(sides, batch=4, prompt=8, tokens=100, seconds=0.0, clock=clock)
    assert found["ours int4"]["decode_tok_s"] == pytest.approx(4000) and found["vllm"]["decode_tok_s"] == pytest.approx(2000)
    assert found["ours int4"]["prompt_ms"] == pytest.approx(20) and found["ours int4"]["against_ours"] is None
    assert found["vllm"]["against_ours"]["median"] == pytest.approx(0.5)
    assert gpu.bandwidth_percent(10**9, 4, 4000.0, 2000.0) == pytest.approx(50)


def test_our_engine_computes_every_prompt_and_leaves_memory_to_the_others(monkeypatch):
    """Rounds repeat their prompts, which a prefix cache would not compute again; the others have none here."""
    asked = {}
    monkeypatch.setattr(deepseek_optimizer, "load_model", lambda model, **options: asked.update(options))
    monkeypatch.setattr(deepseek_optimizer, "make_engine", lambda model, **options: asked.update(options))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (70 << 30, 80 << 30))
    gpu.Ours("some/model", "int4")
    assert asked["prefix_cache"] is False and asked["drafts"] is False
    assert asked["kv_cache_memory"] == 8 << 30


def test_sides_are_those_that_are_installed():
    assert set(gpu.available(lambda package: package != "sglang" or None)) == {"transformers", "vllm"}


def test_the_file_is_named_after_the_card(monkeypatch, tmp_path):
    clock = _Clock()
    monkeypatch.setattr(gpu, "why_no_cuda", lambda: None)
    monkeypatch.setattr(gpu, "bandwidth_gb_s", lambda: 3000.0)
    monkeypatch.setattr(gpu, "available", lambda: {"transformers": lambda model: _Side(clock, 10, 2.0)})
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    made = SimpleNamespace(generate=_Side(clock, 5, 1.0).generate, floor_bytes=lambda contexts: 10**9 + len(contexts))
    monkeypatch.setattr(gpu, "Ours", lambda model, precision: made)
    gpu.main(["some/model", "--formats", "int4", "--batches", "1", "2", "--seconds", "0"], tmp_path)
    rows = json.loads((tmp_path / "gpu-h100-80gb-hbm3.json").read_text())
    assert list(rows) == ["model int4, 1 of 512+128", "model int4, 2 of 512+128"]
    row = rows["model int4, 1 of 512+128"]
    assert row["card"] == "NVIDIA H100 80GB HBM3" and {"ours int4", "transformers"} == set(row["sides"])
    assert row["sides"]["ours int4"]["bandwidth_percent"] > 0


def test_without_a_card(monkeypatch):
    monkeypatch.setattr(gpu, "why_no_cuda", lambda: "torch finds no CUDA device")
    with pytest.raises(ConfigError, match="the benchmark needs a card: torch finds no CUDA device"):
        gpu.main(["some/model"])
