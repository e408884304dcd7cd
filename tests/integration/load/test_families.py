"""Saved models of every family, loaded and run: logits and generated tokens are those of Transformers."""

from __future__ import annotations

import pytest
import torch

from deepseek_optimizer import load_model
from support.models import CASES, assert_close_rows, random_ids, random_model, transformers_logits

# One case per family that other tests of loading do not use.
FAMILIES = {
    name.split("-")[0]: name
    for name in CASES
    if not name.startswith(("llama-", "qwen2-", "qwen3-", "deepseek", "youtu", "mistral-"))
}


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_tokens(family, tmp_path):
    plain = random_model(CASES[FAMILIES[family]]())
    plain.save_pretrained(tmp_path / "model")
    ids = random_ids(plain.config, 45)
    model = load_model(tmp_path / "model", precision="fp32", backend="reference")
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0].float()
    assert_close_rows(logits, transformers_logits(plain, ids))
    prompt = {"input_ids": torch.tensor([ids[:40]]), "attention_mask": torch.ones(1, 40, dtype=torch.int64)}
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    assert model.generate(**prompt, **options).tolist() == plain.generate(**prompt, **options).tolist()
    embeds = model.get_input_embeddings()(prompt["input_ids"])
    torch.testing.assert_close(embeds, plain.get_input_embeddings()(prompt["input_ids"]))
    with torch.no_grad():
        logits = model(inputs_embeds=embeds).logits[0].float()
    assert_close_rows(logits, transformers_logits(plain, ids[:40]))
