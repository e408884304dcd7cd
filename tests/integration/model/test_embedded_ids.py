"""Embeddings as input of a model with embeddings per layer: their token ids are found in the table, as in Transformers."""

from __future__ import annotations

import pytest
import torch

from deepseek_optimizer import DeepSeekConfig, DynamicGraphOptimizer
from deepseek_optimizer.integration.model.embedded_ids import embedded_ids
from support.models import CASES, assert_close_rows, random_ids, random_model


@pytest.fixture(scope="module")
def plain():
    return random_model(CASES["gemma4_text-shared"]())


def optimized(precision="fp32", dtype=torch.float32):
    model = random_model(CASES["gemma4_text-shared"](), dtype=dtype)
    return DynamicGraphOptimizer(model, config=DeepSeekConfig(precision=precision)).optimize()


@torch.no_grad()
def test_logits_and_tokens_equal_transformers(plain):
    fast, ids = optimized(), torch.tensor([random_ids(plain.config, 45), random_ids(plain.config, 45, seed=1)])
    embeds = fast.get_input_embeddings()(ids)
    assert_close_rows(fast(inputs_embeds=embeds).logits, plain(ids).logits)
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    assert torch.equal(fast.generate(inputs_embeds=embeds, **options), plain.generate(inputs_embeds=embeds, **options))


@pytest.mark.parametrize(("precision", "dtype"), [("int8", torch.float32), ("bf16", torch.bfloat16)])
def test_ids_of_rounded_embeddings(precision, dtype):
    fast = optimized(precision, dtype)
    ids = torch.tensor([random_ids(fast.config, 30)])
    assert torch.equal(embedded_ids(fast, fast.get_input_embeddings()(ids)), ids)


@torch.no_grad()
def test_other_rows_are_refused():
    fast = optimized()
    embeds = fast.get_input_embeddings()(torch.tensor([[3, 4, 5]]))
    embeds[0, 1] += 1
    with pytest.raises(ValueError, match="row 1 is not an entry of the embedding table.*pass input_ids"):
        fast(inputs_embeds=embeds)
