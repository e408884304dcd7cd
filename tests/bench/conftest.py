"""Small models for the tests of the benchmarks: the measuring is tested, not the models."""

from __future__ import annotations

import shutil

import pytest


@pytest.fixture
def plain(tiny_model):
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)


@pytest.fixture
def optimized(tiny_model):
    from deepseek_optimizer import load_model

    return load_model(tiny_model, precision="int8", threads=1)


@pytest.fixture(params=["plain", "optimized"])
def either(request):
    """Transformers' model, then an optimized one."""
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="module")
def soaked_engine(tiny_model, tmp_path_factory):
    """An engine for soak tests: a context of 2,048 tokens, and fewer blocks than its concurrent requests could use."""
    from transformers import AutoTokenizer

    from deepseek_optimizer import load_model
    from deepseek_optimizer.serving import make_async_engine
    from support.damaged_checkpoints import set_config

    folder = tmp_path_factory.mktemp("soak") / "model"
    shutil.copytree(tiny_model, folder)
    set_config(folder, max_position_embeddings=2048)
    model = load_model(folder, precision="int8", threads=1, kv_cache_memory=1 << 20)
    return make_async_engine(model, AutoTokenizer.from_pretrained(folder))


@pytest.fixture
def report():
    """report(decode=[...], **fields): a report with one workload, as written by `dso bench`."""
    from deepseek_optimizer.bench.metrics import figures
    from deepseek_optimizer.bench.run_benchmark import SCHEMA

    def make(decode=(100.0, 101.0, 99.0), **fields):
        values = {
            "ttft_ms": [50.0, 51.0, 49.0],
            "itl_ms": [10.0, 9.0, 11.0],
            "prefill_tok_s": [1000.0, 1010.0, 990.0],
            "decode_tok_s": list(decode),
            "output_tok_s": [80.0, 81.0, 79.0],
        }
        entry = {
            "work": {"prompt": 64, "new": 8, "depth": 0, "batch": 1},
            "figures": figures(values),
            "limits": None,
            "watts": None,
            "joules_per_token": None,
            "cost": None,
        }
        return {
            "schema": SCHEMA, "date": "2026-11-27T15:04:05+00:00", "seconds": 95.0, "machine_memory_bytes": 24 << 30,
            "load": {"cores": 2, "load_average": 0.25, "others_before": 0.0, "others_during": 0.125, "busy": []},
            "model": "m", "cpu": "A CPU", "threads": 2, "config": {"precision": "int4"}, "backend": "cpu",
            "formats": {"int4": 76_000_000}, "versions": {"torch": "2"}, "load_s": 1.0, "memory_bytes": 10**8, "works": [entry],
            **fields,
        }  # fmt: skip

    return make
