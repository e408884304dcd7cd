"""Properties of Transformers' modules."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from deepseek_optimizer.integration.training.modules import (
    attention_function,
    attention_name,
    is_expert_parallel,
    is_tied,
    set_attention_name,
    silu_limit,
    uses_silu,
)
from support.family_configs import llama
from support.models import CASES, random_model


def test_the_attention_of_a_config():
    config = llama()
    set_attention_name(config, "sdpa")
    assert attention_name(config) == "sdpa"
    query = torch.randn(1, 2, 3, 8)
    module = nn.Module()
    module.is_causal = True
    out, _ = attention_function("sdpa")(module, query, query, query, None)
    expected = nn.functional.scaled_dot_product_attention(query, query, query, is_causal=True)
    assert torch.allclose(out, expected.transpose(1, 2))
    with pytest.raises(KeyError):
        attention_function("no such attention")


def test_activations_and_experts():
    model = random_model(CASES["llama-gqa"]())
    mlp = model.model.layers[0].mlp
    assert uses_silu(mlp) and not uses_silu(model.model.layers[0])
    mlp.act_fn = nn.GELU()
    assert not uses_silu(mlp) and not is_expert_parallel(mlp)
    mlp._is_expert_parallel = True
    assert is_expert_parallel(mlp)


def test_limits_of_feed_forward_blocks():
    block = random_model(CASES["deepseek_v4-mixed"]()).model.layers[0].mlp
    for module in (block.experts, block.shared_experts):
        assert uses_silu(module) and silu_limit(module) == 1.5
    other = random_model(CASES["llama-gqa"]()).model.layers[0].mlp
    assert silu_limit(other) is None
    other.limit = 1.5  # whose formula is not known
    assert not uses_silu(other) and silu_limit(other) is None


def test_tied_weights():
    tied = random_model(llama(tie_word_embeddings=True))
    assert is_tied(tied, "lm_head.weight") and not is_tied(tied, "model.norm.weight")
    assert not is_tied(nn.Linear(2, 2), "weight")
