"""TRL's trainer on a packed model with adapters: its own forward reads the head's weight."""

from __future__ import annotations

import peft
import pytest
import torch

from deepseek_optimizer import PagedCache, load_model
from deepseek_optimizer.integration.compat import cache_name


@pytest.fixture
def model(tiny_model):
    return load_model(tiny_model, precision="int4", backend="reference")


def trainer_of(model, tokenizer, folder, **options):
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    settings = {"max_steps": 3, "per_device_train_batch_size": 2, "learning_rate": 0.03, "logging_steps": 1, "max_length": 32}
    return SFTTrainer(
        model=model,
        args=SFTConfig(str(folder), **settings, report_to=[], save_strategy="no", use_cpu=True, bf16=False),
        train_dataset=Dataset.from_dict({"text": ["the quick brown fox jumps over"] * 6}),
        processing_class=tokenizer,
        **options,
    )


@pytest.fixture
def trained(model, byte_tokenizer, tmp_path):
    """A trainer after some steps on one text, and the packed weights before training."""
    before = {name: value.clone() for name, value in model.state_dict().items()}
    config = peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer = trainer_of(model, byte_tokenizer, tmp_path, peft_config=config)
    trainer.train()
    return trainer, before


def test_adapters_are_trained_and_packed_weights_are_unchanged(trained, byte_tokenizer):
    trainer, before = trained
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert len(losses) == 3 and losses[2] < losses[0] - 0.1
    after = {name.replace(".base_layer", ""): value for name, value in trainer.model.base_model.model.state_dict().items()}
    assert all(torch.equal(after[name], value) for name, value in before.items())
    model, ids = trainer.model.eval(), byte_tokenizer("the lazy dog", return_tensors="pt").input_ids
    fused, own = (model(input_ids=ids, labels=ids, **more).loss for more in ({"fused_lm_head": True}, {}))
    torch.testing.assert_close(fused, own, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_the_merged_model_uses_the_plan(trained, byte_tokenizer):
    ids = byte_tokenizer("the quick", return_tensors="pt").input_ids
    wrapped = trained[0].model.eval()
    assert wrapped.base_model.model.get_output_embeddings() is not wrapped.base_model.model.lm_head  # a float copy
    merged = wrapped.merge_and_unload()
    assert isinstance(getattr(merged(ids, use_cache=True), cache_name()), PagedCache)
    assert merged.get_output_embeddings() is merged.lm_head


def test_without_adapters_it_is_an_immediate_error(model, byte_tokenizer, tmp_path):
    with pytest.raises(ValueError, match="cannot perform fine-tuning on purely quantized models.*adapters"):
        trainer_of(model, byte_tokenizer, tmp_path)
