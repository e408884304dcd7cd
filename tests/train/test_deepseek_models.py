"""DeepSeek's models in `DeepSeekTrainer`: latent attention, experts, balancing, multi-token prediction, FP8 checkpoints."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

from deepseek_optimizer import ConfigError, load_model
from deepseek_optimizer.train.balancing import routers
from support.family_configs import deepseek_v3, llama
from support.fp8_files import dequantized, fp8_copy
from support.models import CASES, random_ids, random_model
from support.mtp_files import save_with_mtp
from support.training import Rows, arguments, losses, make_trainer

_PLAIN = ("output_dir", "max_steps", "per_device_train_batch_size", "logging_steps", "learning_rate", "report_to",
          "save_strategy", "disable_tqdm", "dataloader_pin_memory", "lr_scheduler_type")  # fmt: skip


def plain_losses(model, folder, **fields):
    """Losses of Transformers' Trainer."""
    base = {name: getattr(arguments(folder), name) for name in _PLAIN}
    trainer = Trainer(model, TrainingArguments(**{**base, "use_cpu": True, **fields}), train_dataset=Rows())
    trainer.train()
    return losses(trainer)


def biases(model):
    return {path: router.e_score_correction_bias.clone() for path, router in routers(model)}


@pytest.mark.parametrize("name", ["deepseek_v2-groups", "deepseek_v3-groups", "deepseek_v3-direct", "deepseek_v32-indexer"])
def test_fp32_equals_transformers_trainer(tmp_path, name):
    theirs = plain_losses(random_model(CASES[name]()), tmp_path, learning_rate=1e-3)
    ours = make_trainer(
        random_model(CASES[name]()), tmp_path, bf16=False, optimizer_state="fp32", moe_balance_rate=0.0, learning_rate=1e-3
    )
    report = ours.report()
    ours.train()
    torch.testing.assert_close(torch.tensor(losses(ours)), torch.tensor(theirs), rtol=1e-4, atol=0)
    native = "".join(report.native)
    assert "Experts" in native and ("Attention" in native) == ("v32" not in name)


def test_experts_are_balanced_and_mtp_layers_are_trained(tmp_path):
    model = random_model(deepseek_v3(num_nextn_predict_layers=2))
    before = biases(model)
    trainer = make_trainer(
        model,
        tmp_path,
        mtp_loss_weight=0.3,
        moe_sequence_loss_weight=1e-4,
        learning_rate=3e-3,
        max_steps=10,
        gradient_accumulation_steps=2,
    )
    drawn = {name: p.clone() for name, p in model.named_parameters() if name.startswith("model.layers.3.")}
    assert len(before) == 2 and len(biases(model)) == 4 and drawn
    assert [note for note in trainer.report().notes if "MTP layer" in note]
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "mtp_loss" in entry]
    assert len(logs) == 10 and logs[-1]["mtp_loss"] < logs[0]["mtp_loss"]
    assert all(entry["expert_load"] >= entry["expert_load_layer_4"] >= 1 for entry in logs)
    after = biases(model)
    assert all((after[path] - before[path]).abs().max() > 5e-4 for path in before)
    assert all(not torch.equal(model.get_parameter(name).float(), p.float()) for name, p in drawn.items())
    trainer.save_model(str(tmp_path / "m"))
    fast = load_model(tmp_path / "m", backend="reference", precision="fp32")
    assert len(fast.dso.mtp_plans) == 2
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.float32).eval()
    assert len(plain.model.layers) == 3
    ids = torch.tensor([random_ids(model.config, 9)])
    torch.testing.assert_close(fast(ids).logits.float(), plain(ids).logits, rtol=1e-3, atol=1e-3)
    for path, bias in biases(plain).items():
        assert torch.equal(bias, after[path]) and bias.dtype == torch.float32


def test_the_mtp_loss_is_added_with_its_weight(tmp_path):
    actual = {}
    for weight in (None, 0.0, 0.5):
        model = random_model(deepseek_v3(num_nextn_predict_layers=1))
        torch.manual_seed(0)
        trainer = make_trainer(model, tmp_path, bf16=False, mtp_loss_weight=weight, max_steps=1)
        trainer.train()
        actual[weight] = trainer.state.log_history[0]
        evaluated = trainer.evaluate()["eval_loss"]
        assert evaluated == pytest.approx(actual[None]["loss"], rel=0.3)  # the model's own loss, without that of the MTP layers
    assert actual[0.0]["loss"] == pytest.approx(actual[None]["loss"], rel=1e-6)
    assert actual[0.5]["loss"] == pytest.approx(actual[None]["loss"] + 0.5 * actual[0.5]["mtp_loss"], rel=1e-4)


@pytest.mark.parametrize("fields", [{}, {"gradient_accumulation_steps": 2, "activation_memory": "recompute"}])
def test_resumed_equals_uninterrupted(tmp_path, fields):
    fields = {"mtp_loss_weight": 0.3, "moe_balance_rate": 0.05, "learning_rate": 1e-3, "max_steps": 6, **fields}

    def fresh(seed):
        model = random_model(deepseek_v3(num_nextn_predict_layers=1), seed=seed)
        torch.manual_seed(seed)
        return model

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 3

    whole = make_trainer(fresh(0), tmp_path / "a", **fields)
    whole.train()
    saving = {"save_strategy": "steps", "save_steps": 3}
    make_trainer(fresh(0), tmp_path / "b", callbacks=[Stop()], **saving, **fields).train()
    rest = make_trainer(fresh(1), tmp_path / "b", **saving, **fields)
    rest.train(resume_from_checkpoint=True)
    for key in ("loss", "mtp_loss", "expert_load"):
        late = [[e[key] for e in t.state.log_history if key in e][-3:] for t in (whole, rest)]
        assert late[0] == late[1], key
    a, b = whole.model.state_dict(), rest.model.state_dict()
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_the_best_model_includes_its_experts(tmp_path):
    trainer = make_trainer(
        random_model(deepseek_v3()), tmp_path, max_steps=6, learning_rate=0.3, eval_strategy="steps", eval_steps=1,
        save_strategy="steps", save_steps=1, load_best_model_at_end=True, metric_for_best_model="loss", greater_is_better=False,
    )  # fmt: skip
    trainer.train()
    actual = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert trainer.state.best_metric == min(actual) < actual[-1]  # so large a learning rate makes it worse
    assert trainer.evaluate()["eval_loss"] == pytest.approx(min(actual), rel=1e-6)


def test_unsupported_mtp_training(tmp_path):
    with pytest.raises(ConfigError, match="mtp_loss_weight.*num_nextn_predict_layers"):
        make_trainer(random_model(llama()), tmp_path, mtp_loss_weight=0.3)
    for fields in ({"fused_loss": False}, {"label_smoothing_factor": 0.1}):
        with pytest.raises(ConfigError, match="mtp_loss_weight=0.3 needs the fused loss"):
            make_trainer(random_model(deepseek_v3()), tmp_path, mtp_loss_weight=0.3, **fields)


@pytest.fixture
def fp8(tmp_path):
    """An FP8 checkpoint with an MTP layer, as published by DeepSeek, and the equivalent float model."""
    save_with_mtp(tmp_path / "float", deepseek_v3(), repeated=False)
    folder = fp8_copy(tmp_path / "float", tmp_path / "fp8")
    exact = tmp_path / "exact"
    exact.mkdir()
    save_file(dequantized(load_file(folder / "model.safetensors")), exact / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config.pop("quantization_config")
    (exact / "config.json").write_text(json.dumps(config))
    return folder, exact


def test_an_fp8_checkpoint_is_tuned_by_adapters(tmp_path, fp8):
    """Weights stay at one byte, with the checkpoint's codes and scales; the adapter equals the float model's."""
    peft = pytest.importorskip("peft")
    folder, exact = fp8
    config = {"r": 4, "target_modules": r"model\.layers\.[012]\.self_attn\.(q_b_proj|kv_b_proj|o_proj)", "lora_dropout": 0.0}

    def adapted(model):
        torch.manual_seed(0)
        return peft.get_peft_model(model, peft.LoraConfig(**config))

    base = load_model(folder)
    packed = base.model.layers[1].self_attn.o_proj
    experts = base.model.layers[1].mlp.experts
    assert packed.format == "fp8" and experts.gate_up_format == experts.down_format == "fp8"
    before = [packed.weight.clone(), experts.gate_up_proj.clone()]
    trainer = make_trainer(adapted(base), tmp_path / "run", max_steps=8, learning_rate=3e-3)
    trainer.train()
    float_model = adapted(AutoModelForCausalLM.from_pretrained(exact, dtype=torch.float32))
    theirs = plain_losses(float_model, tmp_path, max_steps=8, learning_rate=3e-3)
    ours = losses(trainer)
    assert ours[-1] < ours[0]
    torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs), rtol=0.01, atol=0)
    assert torch.equal(packed.weight, before[0]) and torch.equal(experts.gate_up_proj, before[1])
    trainer.save_model(str(tmp_path / "adapter"))
    tuned = peft.PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(exact, dtype=torch.float32), tmp_path / "adapter"
    ).eval()
    ids = torch.stack([Rows(8)[i]["input_ids"] for i in range(8)])
    with torch.no_grad():
        loss = tuned(input_ids=ids, labels=ids).loss
        untuned = AutoModelForCausalLM.from_pretrained(exact, dtype=torch.float32).eval()(input_ids=ids, labels=ids).loss
    assert loss < untuned


def test_an_adapter_is_trained_with_mtp(tmp_path, fp8):
    """`load_model` keeps a checkpoint's MTP layers, so they may have adapters."""
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(load_model(fp8[0]), peft.LoraConfig(r=4, target_modules=["o_proj", "eh_proj"]))
    trainer = make_trainer(model, tmp_path, max_steps=8, learning_rate=1e-2, mtp_loss_weight=1.0)
    trainer.train()
    actual = [entry["mtp_loss"] for entry in trainer.state.log_history if "mtp_loss" in entry]
    assert len(actual) == 8 and actual[-1] < actual[0]
    moved = {name.split(".")[4] for name, p in model.named_parameters() if "lora_B" in name and p.abs().max() > 0}
    assert moved == {"0", "1", "2", "3"}
