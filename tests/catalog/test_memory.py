"""The memory that well-known models need."""

from __future__ import annotations

import pytest

from deepseek_optimizer.catalog.known import MODELS
from deepseek_optimizer.catalog.memory import CONTEXT, need
from deepseek_optimizer.models import ENCODERS, SUPPORTED


def known(name):
    return next(model for model in MODELS if name in model.name)


@pytest.mark.parametrize(
    "name, parameters", [("SmolLM2-135M", 134.5e6), ("Distill-Qwen-1.5B", 1.777e9), ("Distill-Llama-8B", 8.03e9)]
)
def test_models_with_a_plan(name, parameters):
    needs = need(known(name))
    assert needs.no_plan is None and needs.parameters == pytest.approx(parameters, rel=2e-3)
    assert 0.55 < needs.weights["int4"] / (needs.parameters * 1.0) < 0.60
    assert needs.weights["bf16"] == pytest.approx(2 * needs.parameters, rel=0.01)
    layers, kv_heads, head_dim = {"SmolLM2-135M": (30, 3, 64), "Distill-Qwen-1.5B": (28, 2, 128)}.get(name, (32, 8, 128))
    assert needs.cache_per_token == 2 * 2 * layers * kv_heads * head_dim
    assert needs.total("int8") == needs.weights["int8"] + needs.buffers + needs.cache_per_token * CONTEXT


@pytest.mark.parametrize(
    "name, parameters", [("bert-base", 109.5e6), ("gpt2", 124.4e6), ("t5-base", 222.9e6), ("whisper-large-v3", 1.543e9)]
)
def test_models_on_the_general_path(name, parameters):
    model = known(name)
    if model.family in SUPPORTED:
        pytest.skip(f"{model.family} has a plan")
    needs = need(model)
    assert model.family in needs.no_plan and needs.parameters == pytest.approx(parameters, rel=2e-3)
    if model.family in ENCODERS:
        assert (
            needs.path == "plan" and needs.cache_per_token == 0 and needs.total("int8") == needs.weights["int8"] + needs.buffers
        )
        assert 512 * 4 * 4 * 768 < needs.buffers < 512 * 4 * 16 * 768  # rows of at least q, k, v and the residual
    else:
        assert needs.path == "general" and needs.cache_per_token is None and needs.total("int8") == needs.weights["int8"]
    assert needs.weights["bf16"] == pytest.approx(2 * needs.parameters, rel=0.01)
    assert needs.weights["int4"] < needs.weights["int8"] < needs.weights["bf16"]
