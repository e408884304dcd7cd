"""Models loaded for training: complete or not at all, and without a report on tensors that are left out on purpose."""

from __future__ import annotations

import logging

import pytest
import torch
from safetensors.torch import load_file, save_file

from deepseek_optimizer.errors import CheckpointError
from deepseek_optimizer.train.load_for_training import load_for_training
from support.family_configs import llama
from support.models import random_model
from support.tiny_v3 import tiny_v3


def test_skipped_layers_give_no_report():
    heard: list[str] = []
    listener = logging.Handler(logging.WARNING)
    listener.emit = lambda record: heard.append(record.getMessage())
    logger = logging.getLogger("transformers")
    logger.addHandler(listener)
    try:
        model = load_for_training(tiny_v3(), torch.bfloat16)
    finally:
        logger.removeHandler(listener)
    assert model.dtype == torch.bfloat16 and not heard


@pytest.mark.parametrize("change", ["gone", "shape"])
def test_a_missing_weight_is_named(tmp_path, change):
    random_model(llama()).save_pretrained(tmp_path)
    file, name = tmp_path / "model.safetensors", "model.layers.1.mlp.up_proj.weight"
    tensors = load_file(file)
    kept = {**tensors, name: tensors[name][1:].contiguous()} if change == "shape" else tensors
    if change == "gone":
        del tensors[name]
    save_file(kept, file, {"format": "pt"})
    with pytest.raises(CheckpointError, match=name):
        load_for_training(tmp_path, torch.float32)
