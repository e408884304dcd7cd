"""Which layers get an adapter."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from deepseek_optimizer import load_model
from deepseek_optimizer.errors import ConfigError
from deepseek_optimizer.train.lora import add_adapter, targets_of
from support.family_configs import deepseek_v3, llama
from support.tiny_v3 import tiny_v3


def empty(config):
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def test_attention_and_mlps_get_adapters():
    dense = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert set(targets_of(empty(llama()))) == dense
    latent = {"q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"}
    assert set(targets_of(empty(deepseek_v3()))) == latent, "PEFT would adapt the experts in place of the MLPs"


def test_adapters_of_a_packed_model_with_experts():
    model = load_model(tiny_v3(), precision="int4")
    with pytest.raises(ConfigError, match=r"'up_proj' as the name of the experts' weights, which are packed; leave it out"):
        targets_of(model, ("q_a_proj", "up_proj"))
    wrapped = add_adapter(model, 4, 8.0, 0.0, targets_of(model))
    assert not wrapped.peft_config["default"].target_parameters


def test_names_must_exist():
    model = empty(llama())
    assert targets_of(model, ("v_proj", "lm_head")) == ["v_proj", "lm_head"]
    with pytest.raises(ConfigError, match="no linear layer 'query'; it has .*q_proj"):
        targets_of(model, ("v_proj", "query"))
