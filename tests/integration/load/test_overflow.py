"""Weights that are too large for the scales of their format are refused by name, however the model is made."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from deepseek_optimizer import CheckpointError, ConfigError, DeepSeekConfig, DynamicGraphOptimizer, load_model
from deepseek_optimizer.integration.load.pack_checkpoint import pack_checkpoint
from support.models import CASES, random_model

WHERE = "model.layers.1.mlp.down_proj.weight"
PROBLEM = r"has weights of up to 2e\+06, which are too large for int4; set formats="


def large(case: str = "llama-gqa") -> torch.nn.Module:
    model = random_model(CASES[case]())
    with torch.no_grad():
        model.get_parameter(WHERE)[3, 5] = -2e6
    return model


def test_every_way_to_load(tmp_path: Path) -> None:
    folder = tmp_path / "float"
    large().save_pretrained(folder)
    fields = {"precision": "int4", "calibration": "none"}
    with pytest.raises(CheckpointError, match=rf"{WHERE}.*{PROBLEM}"):
        load_model(folder, **fields)
    with pytest.raises(CheckpointError, match=rf"{WHERE}.*{PROBLEM}"):
        pack_checkpoint(folder, tmp_path / "packed", fields)
    with pytest.raises(CheckpointError, match=rf"{WHERE}.*{PROBLEM}"):
        AutoModelForCausalLM.from_pretrained(folder, quantization_config=DeepSeekConfig(**fields))
    with pytest.raises(ConfigError, match=f"{WHERE} {PROBLEM}"):
        DynamicGraphOptimizer(large(), config=DeepSeekConfig(**fields)).optimize()
    model = load_model(folder, **fields, formats={WHERE.removesuffix(".weight"): "bf16"})
    assert model.model.layers[1].mlp.down_proj.dequantized()[3, 5] == torch.tensor(-2e6).bfloat16()


def test_experts(tmp_path: Path) -> None:
    model = random_model(CASES["qwen3_moe-plain"]())
    with torch.no_grad():
        model.model.layers[0].mlp.experts.down_proj[1, 3, 5] = 2e6
    model.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=rf"layers\.0\..*experts\.1\..*{PROBLEM}"):
        load_model(tmp_path, precision="int4", calibration="none")
