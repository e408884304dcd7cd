"""The cost of weight and cache formats on a trained DeepSeek-V3 model, as perplexity on held-out documents."""

from __future__ import annotations

import math

import pytest
import torch

from deepseek_optimizer import load_model
from support.tiny_v3 import documents, tiny_v3

# Relative to bf16's perplexity. int8 weights and an int8 cache differ from it by less than documents differ.
ALLOWED = {
    "int8": ({"precision": "int8"}, 1.005),
    "int4": ({"precision": "int4"}, 1.05),
    "int8 cache": ({"precision": "bf16", "kv_cache": "int8"}, 1.005),
    "int4 cache": ({"precision": "bf16", "kv_cache": "int4"}, 1.01),
    "fp8": ({"precision": "fp8"}, 1.01),
}


def perplexity(**fields) -> float:
    """Perplexity over 16 separate documents of 512 tokens."""
    model = load_model(tiny_v3(), **fields)
    total = count = 0.0
    for ids in documents(tiny_v3(), 16, 512):
        tokens = torch.tensor([ids])
        logits = model(tokens, use_cache=False).logits[0, :-1]
        total += torch.nn.functional.cross_entropy(logits, tokens[0, 1:], reduction="sum").item()
        count += len(ids) - 1
    return math.exp(total / count)


@pytest.fixture(scope="module")
def in_bf16() -> float:
    return perplexity(precision="bf16")


def test_it_is_a_trained_model(in_bf16):
    assert in_bf16 < 40  # with 8,192 tokens; untrained it would be thousands


@pytest.mark.parametrize("name", ALLOWED)
def test_perplexity(name, in_bf16):
    fields, factor = ALLOWED[name]
    assert perplexity(**fields) <= factor * in_bf16
