"""Which layers get an adapter."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from deepseek_optimizer.errors import ConfigError
from deepseek_optimizer.train.lora import targets_of
from support.family_configs import deepseek_v3, llama


def empty(config):
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def test_attention_and_dense_mlps_get_adapters():
    dense = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert set(targets_of(empty(llama()))) == dense
    latent = {"q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert set(targets_of(empty(deepseek_v3()))) == latent


def test_names_must_exist():
    model = empty(llama())
    assert targets_of(model, ("v_proj", "lm_head")) == ["v_proj", "lm_head"]
    with pytest.raises(ConfigError, match="no linear layer 'query'; it has .*q_proj"):
        targets_of(model, ("v_proj", "query"))
