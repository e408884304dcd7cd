"""`num_parameters` of an optimized model is that of the float model, in every format."""

from __future__ import annotations

import copy

import pytest
from transformers import AutoModelForSequenceClassification

from deepseek_optimizer import DeepSeekConfig, DynamicGraphOptimizer
from support.models import CASES, random_model


@pytest.mark.parametrize("precision", ["fp32", "int4"])
@pytest.mark.parametrize("case", ["llama-biases", "llama-tied", "deepseek_v3-groups"])
def test_the_count_equals_the_float_model(case, precision):
    plain = random_model(CASES[case]())
    config = DeepSeekConfig(precision=precision, backend="reference")
    fast = DynamicGraphOptimizer(copy.deepcopy(plain), config=config).optimize()
    assert fast.num_parameters() == plain.num_parameters()
    assert fast.num_parameters(exclude_embeddings=True) == plain.num_parameters(exclude_embeddings=True)
    assert fast.num_parameters(only_trainable=True) == 0


def test_a_classifier_includes_its_head():
    plain = AutoModelForSequenceClassification.from_config(CASES["llama-gqa"]())
    config = DeepSeekConfig(precision="fp32", backend="reference")
    fast = DynamicGraphOptimizer(copy.deepcopy(plain), config=config).optimize()
    assert fast.num_parameters() == plain.num_parameters()
    assert fast.num_parameters(only_trainable=True) == fast.score.weight.numel()
