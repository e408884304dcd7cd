"""TRL's trainer on a packed model with adapters: it has a forward of its own, which reads the head's weight."""

from __future__ import annotations

import pytest
import torch

from deepseek_optimizer import PagedCache, load_model
from deepseek_optimizer.integration.compat import cache_name

pytest.importorskip("peft")
pytest.importorskip("trl")


@pytest.fixture
def trained(tiny_model, byte_tokenizer, tmp_path):
    """A trainer after some steps on one text, and the packed weights that there were before."""
    from datasets import Dataset
    from peft import LoraConfig
    from trl import SFTConfig, SFTTrainer

    model = load_model(tiny_model, precision="int4", backend="reference")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(
            output_dir=str(tmp_path),
            max_steps=3,
            per_device_train_batch_size=2,
            learning_rate=0.03,
            logging_steps=1,
            max_length=32,
            report_to=[],
            save_strategy="no",
            use_cpu=True,
            bf16=False,
        ),  # fmt: skip
        train_dataset=Dataset.from_dict({"text": ["the quick brown fox jumps over"] * 6}),
        processing_class=byte_tokenizer,
        peft_config=LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    trainer.train()
    return trainer, before


def test_adapters_learn_and_the_packed_weights_stay(trained, byte_tokenizer):
    trainer, before = trained
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert len(losses) == 3 and losses[2] < losses[0] - 0.1
    after = {name.replace(".base_layer", ""): value for name, value in trainer.model.base_model.model.state_dict().items()}
    assert all(torch.equal(after[name], value) for name, value in before.items())
    model, ids = trainer.model.eval(), byte_tokenizer("the lazy dog", return_tensors="pt").input_ids
    fused, own = (model(input_ids=ids, labels=ids, **more).loss for more in ({"fused_lm_head": True}, {}))
    torch.testing.assert_close(fused, own, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_the_plan_serves_the_merged_model(trained, byte_tokenizer):
    ids = byte_tokenizer("the quick", return_tensors="pt").input_ids
    wrapped = trained[0].model.eval()
    assert wrapped.base_model.model.get_output_embeddings() is not wrapped.base_model.model.lm_head  # a float copy
    merged = wrapped.merge_and_unload()
    assert isinstance(getattr(merged(ids, use_cache=True), cache_name()), PagedCache)
    assert merged.get_output_embeddings() is merged.lm_head
