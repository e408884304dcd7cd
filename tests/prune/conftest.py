from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from deepseek_optimizer import load_model
from support.models import random_ids, random_model


@pytest.fixture
def saved(tmp_path):
    """saved(config, change): the folder of a random float32 model, after `change(model)`."""

    def save(config, change=lambda model: None):
        model = random_model(config)
        with torch.no_grad():
            change(model)
        model.save_pretrained(tmp_path / "original")
        return tmp_path / "original"

    return save


@pytest.fixture
def texts():
    """texts(config): three texts of random tokens."""
    return lambda config: [torch.tensor([random_ids(config, 40, seed)]) for seed in range(3)]


@pytest.fixture
def logits():
    """logits(folder): of 40 random tokens, float32 [T, V], by Transformers; with `precision`, by the optimized model."""

    @torch.no_grad()
    def run(folder, precision=None):
        if precision is None:
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, experts_implementation="eager")
        else:
            model = load_model(folder, precision=precision)
        return model(torch.tensor([random_ids(model.config, 40)]), use_cache=False).logits[0]

    return run
