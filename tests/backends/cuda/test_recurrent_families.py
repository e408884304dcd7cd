"""Logits of families with recurrent states, beside those of the reference."""

from __future__ import annotations

import pytest

from support import triton_interpreter

DEVICE = triton_interpreter.require_device()

from deepseek_optimizer.backends.cuda.backend import CudaBackend
from support import family_configs as configs
from support.models import assert_close_rows, random_ids, random_model

from .plans import BF16_CACHE, FORMAT_TOLERANCE, check_mixed_steps, pair, stepwise

LINEAR = {"num_hidden_layers": 2, "layer_types": ["linear_attention", "full_attention"]}
FAMILIES = {
    "qwen3_next-experts": lambda: configs.qwen3_next(**LINEAR),
    "qwen3_5_text-axes": lambda: configs.qwen3_5_text(**LINEAR),
    "kimi_linear-channels": lambda: configs.kimi_linear(**LINEAR, mlp_layer_types=["dense", "sparse"]),
    "lfm2-convolutions": lambda: configs.lfm2(
        hidden_size=96, num_hidden_layers=3, layer_types=["conv", "full_attention", "conv"], conv_bias=True
    ),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_families(family):
    model = random_model(FAMILIES[family]())
    made, exact = pair(CudaBackend(DEVICE), model)
    ids = random_ids(model.config, 21)
    assert_close_rows(stepwise(made, ids), stepwise(exact, ids), FORMAT_TOLERANCE["fp32"])


def test_a_bf16_model_with_a_bf16_cache():
    model = random_model(FAMILIES["qwen3_5_text-axes"]())
    made, exact = pair(CudaBackend(DEVICE), model, "bf16", "bf16")
    ids = random_ids(model.config, 14)
    assert_close_rows(stepwise(made, ids), stepwise(exact, ids), BF16_CACHE)


@pytest.mark.parametrize("family", ["qwen3_next-experts", "lfm2-convolutions"])
def test_mixed_steps(family):
    check_mixed_steps(CudaBackend(DEVICE), random_model(FAMILIES[family]()))


def test_sizes():
    """Of states, with the memory that the store allocates for them."""
    model = random_model(FAMILIES["lfm2-convolutions"]())
    made, _ = pair(CudaBackend(DEVICE), model)
    assert not len(made.store.states.data)
    made.logits(random_ids(model.config, 3))
    graph = made.plan.graph
    assert made.store.state_bytes == CudaBackend(DEVICE).state_bytes(graph) == made.store.states.data[0].nbytes
    assert len(made.store.states.data) == made.store.num_states == 16
