"""The tiny model with its own engine."""

from __future__ import annotations

import pytest

from deepseek_optimizer import load_model, load_tokenizer, make_engine


@pytest.fixture(scope="session")
def endless(tiny_model):
    """(model, tokenizer) whose random answers never end early."""
    model = load_model(tiny_model)
    model.generation_config.eos_token_id = model.config.eos_token_id = None
    return model, load_tokenizer(tiny_model)


@pytest.fixture
def engine(endless):
    return make_engine(*endless)
