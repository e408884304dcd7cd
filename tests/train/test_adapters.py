"""PEFT adapters: on plain models and on packed ones, trained, resumed, saved and merged into the model."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, TrainerCallback

from deepseek_optimizer import DeepSeekConfig, load_model
from deepseek_optimizer.integration.bind.modules import PackedLinear
from support.family_configs import llama
from support.models import random_model
from support.training import losses, make_trainer

TARGETS = ["q_proj", "v_proj", "o_proj", "gate_proj", "down_proj"]


def _with_adapter(model, **fields):
    torch.manual_seed(0)
    return get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS, task_type="CAUSAL_LM", **fields))


def _run(folder, **fields):
    trainer = make_trainer(_with_adapter(random_model(llama(), seed=2)), folder, **fields)
    trainer.train()
    return trainer


def test_only_the_adapter_is_trained(tmp_path):
    base = random_model(llama(), seed=2).bfloat16()
    trainer = _run(tmp_path, max_steps=12)
    assert losses(trainer)[-1] < losses(trainer)[0]
    trained = [name for name, p in trainer.model.named_parameters() if p.requires_grad]
    assert trained and all("lora_" in name for name in trained)
    assert trainer.report().trained == sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    assert torch.equal(trainer.model.get_base_model().model.layers[0].self_attn.q_proj.base_layer.weight,
                       base.model.layers[0].self_attn.q_proj.weight)  # fmt: skip
    assert all(p.dtype == torch.bfloat16 for p in trainer.model.parameters())


def test_all_recompute_settings_give_bitwise_equal_runs(tmp_path):
    runs = [losses(_run(tmp_path, activation_memory=memory)) for memory in ("full", "selective", "recompute")]
    assert runs[0] == runs[1] == runs[2]


def test_equals_transformers_trainer(tmp_path):
    from transformers import Trainer, TrainingArguments

    ours = _run(tmp_path, bf16=False, optimizer_state="fp32")
    same = ("max_steps", "per_device_train_batch_size", "logging_steps", "learning_rate", "report_to", "save_strategy",
            "disable_tqdm", "dataloader_pin_memory", "lr_scheduler_type")  # fmt: skip
    args = TrainingArguments(output_dir=str(tmp_path), optim="adamw_torch", **{name: getattr(ours.args, name) for name in same})
    plain = Trainer(_with_adapter(random_model(llama(), seed=2)), args, train_dataset=ours.train_dataset)
    plain.train()
    assert losses(ours) == pytest.approx(losses(plain), rel=1e-5)


def test_saved_loaded_and_merged(tmp_path):
    trainer = _run(tmp_path)
    trainer.save_model()
    base = random_model(llama(), seed=2).bfloat16()
    again = PeftModel.from_pretrained(base, tmp_path)
    ids = torch.arange(3, 20)[None]
    expected = trainer.model.eval()(ids).logits.detach()
    torch.testing.assert_close(again.eval()(ids).logits, expected, rtol=0, atol=0.05 * float(expected.abs().max()))
    trainer.model.merge_and_unload().save_pretrained(tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto")
    torch.testing.assert_close(merged(ids).logits, expected, rtol=0, atol=0.05 * float(expected.abs().max()))


def test_resumed_equals_uninterrupted(tmp_path):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 3

    def begin(folder, **more):
        model = _with_adapter(random_model(llama(), seed=2), lora_dropout=0.3)
        return make_trainer(model, folder, save_strategy="steps", save_steps=3, **more)

    whole = begin(tmp_path / "a")
    whole.train()
    begin(tmp_path / "b", callbacks=[Stop()]).train()
    rest = begin(tmp_path / "b")
    rest.train(resume_from_checkpoint=True)
    assert losses(rest)[-3:] == losses(whole)[-3:]
    for a, b in zip(rest.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("memory", ["selective", "recompute"])
def test_on_packed_weights(tmp_path, tiny_model, memory):
    model = _with_adapter(load_model(tiny_model, DeepSeekConfig(precision="int4")))
    packed = [m for m in model.modules() if isinstance(m, PackedLinear)]
    before = [m.weight.clone() for m in packed]
    trainer = make_trainer(model, tmp_path, max_steps=12, activation_memory=memory)
    report = trainer.report()
    assert packed and report.fused_loss and report.trained < report.weights
    trainer.train()
    assert losses(trainer)[-1] < losses(trainer)[0]
    assert all(torch.equal(a, m.weight) for a, m in zip(before, packed, strict=True))
    trainer.save_model()
    again = PeftModel.from_pretrained(load_model(tiny_model, DeepSeekConfig(precision="int4")), tmp_path)
    ids = torch.arange(3, 20)[None]
    expected = trainer.model.eval()(ids).logits.detach()
    torch.testing.assert_close(again.eval()(ids).logits, expected, rtol=0, atol=0.05 * float(expected.abs().max()))


def test_a_head_with_an_adapter_is_not_fused(tmp_path):
    model = get_peft_model(random_model(llama()), LoraConfig(r=4, target_modules=["lm_head", "q_proj"], task_type="CAUSAL_LM"))
    trainer = make_trainer(model, tmp_path, max_steps=12)
    trainer.train()
    assert losses(trainer)[-1] < losses(trainer)[0]
    assert "lm_head" in str(trainer.report())
