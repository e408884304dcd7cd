"""Logits equal Transformers' for any epsilon of the norms: small, zero, or as large as the mean square itself."""

from __future__ import annotations

import copy

import pytest
import torch

from deepseek_optimizer import DeepSeekConfig, DynamicGraphOptimizer
from support.models import CASES, assert_close_rows, random_ids, random_model

from .conftest import BACKENDS


def optimized(plain, backend):
    fast = copy.deepcopy(plain)
    DynamicGraphOptimizer(fast, config=DeepSeekConfig(precision="fp32", backend=backend)).optimize()
    return fast


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case,eps", [("llama-gqa", 0.0), ("llama-gqa", 1.0), ("qwen3-gqa", 40.0), ("deepseek_v3-groups", 1.0)])
@torch.no_grad()
def test_eps_of_the_config(case, eps, backend):
    config = CASES[case]()
    config.rms_norm_eps = eps
    plain = random_model(config)
    ids = torch.tensor([random_ids(config, 20)])
    assert_close_rows(optimized(plain, backend)(ids).logits, plain(ids).logits)


@pytest.mark.parametrize("case", ["llama-gqa", "deepseek_v3-groups", "deepseek_v32-indexer"])
@torch.no_grad()
def test_eps_set_on_the_modules(case):
    plain = random_model(CASES[case]())
    for module in plain.modules():
        for name in ("variance_epsilon", "eps"):
            if hasattr(module, name):
                setattr(module, name, 1.0)
    ids = torch.tensor([random_ids(plain.config, 20)])
    assert_close_rows(optimized(plain, "reference")(ids).logits, plain(ids).logits)
