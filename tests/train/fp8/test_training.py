"""Training in FP8: which layers use it, that FP8 arithmetic ran, the difference of the loss to bf16, messages and errors."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from deepseek_optimizer.errors import BackendError
from deepseek_optimizer.integration.bind.runtime import OptimizerWarning
from deepseek_optimizer.train.arguments import DeepSeekTrainingArguments
from deepseek_optimizer.train.fp8 import Fp8Products, backend
from deepseek_optimizer.train.modules.fp8_linear import TrainedFp8Linear
from deepseek_optimizer.train.prepare import prepare
from deepseek_optimizer.train.trainer import DeepSeekTrainer
from support.family_configs import deepseek_v3
from support.train_runs import tiny_llama, tiny_trainer


def run(folder: Path, model=None, **fields):
    fields = {"logging_steps": 1, "save_strategy": "no", "seed": 1, **fields}
    return tiny_trainer(folder, model, DeepSeekTrainer, DeepSeekTrainingArguments, **fields)


def experts() -> torch.nn.Module:
    torch.manual_seed(0)
    config = deepseek_v3(vocab_size=96, num_nextn_predict_layers=0)
    return AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize("make", [tiny_llama, experts])
def test_layers_of_blocks_are_in_fp8_and_the_head_is_not(make) -> None:
    model = make()
    prepared = prepare(model, fp8=Fp8Products())
    linear = {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    in_fp8 = {name for name, module in linear.items() if isinstance(module, TrainedFp8Linear)}
    assert linear.keys() - in_fp8 == {"lm_head"} and len(in_fp8) > 6
    prepared.undo()
    assert not any("fp8" in module.__dict__ or isinstance(module, TrainedFp8Linear) for module in model.modules())


def test_adapters_stay_in_bf16() -> None:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(tiny_llama(), peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    prepare(model, fp8=Fp8Products())
    in_fp8 = {name for name, module in model.named_modules() if isinstance(module, TrainedFp8Linear)}
    assert any("q_proj.base_layer" in name for name in in_fp8) and not any("lora_" in name for name in in_fp8)


@pytest.mark.parametrize("make", [lambda: tiny_llama(attention_dropout=0.0, hidden_size=144), experts], ids=["llama", "v3"])
def test_loss_is_within_half_a_percent_of_bf16(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make) -> None:
    """FP8 was used: both operands of each product were rounded, and the final weights differ."""
    calls = []
    real = backend.round_trip
    monkeypatch.setattr(backend, "round_trip", lambda *a: (calls.append(a[1:]), real(*a))[1])
    ends, losses = {}, {}
    for fp8 in (False, True):
        trainer = run(tmp_path / str(fp8), make(), max_steps=24, learning_rate=1e-3, fp8_enabled=fp8, fp8_backend="emulate")
        trainer.train()
        losses[fp8] = [log["loss"] for log in trainer.state.log_history if "loss" in log]
        ends[fp8] = {name: weight.clone() for name, weight in trainer.model.named_parameters()}
        assert bool(calls) == fp8
    last = {fp8: sum(seen[-4:]) / 4 for fp8, seen in losses.items()}
    assert abs(last[True] / last[False] - 1) < 0.005 and last[True] < losses[True][0] - 0.15
    assert any(not torch.equal(ends[True][name], ends[False][name]) for name in ends[True])


def test_messages_and_report(tmp_path: Path) -> None:
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        trainer = run(tmp_path, max_steps=2, fp8_enabled=True, fp8_e4m3=False)
        trainer.train()
    message = [w for w in seen if issubclass(w.category, OptimizerWarning) and "FP8" in str(w.message)]
    assert len(message) == 1 and "the same numerics, but slower than bf16" in str(message[0].message)
    assert any("FP8 is emulated" in note for note in trainer.report().notes)


def test_missing_hardware_is_an_immediate_error(tmp_path: Path) -> None:
    with pytest.raises(BackendError, match='fp8_backend="hardware" is not available: .*Hopper'):
        run(tmp_path, fp8_enabled=True, fp8_backend="hardware")


def test_evaluation_equals_the_saved_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "round_trip", lambda *a: pytest.fail("FP8 was used in evaluation"))
    run(tmp_path, fp8_enabled=True, fp8_backend="emulate").evaluate()


def test_resumed_in_fp8_with_accumulation_is_exact(tmp_path: Path) -> None:
    fields = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "gradient_accumulation_steps": 2, "fp8_enabled": True}
    straight = run(tmp_path / "a", **fields)
    straight.train()
    (tmp_path / "a" / "checkpoint-4").rename(tmp_path / "kept")
    again = run(tmp_path / "a", **fields)
    again.train(resume_from_checkpoint=True)
    for (name, one), two in zip(straight.model.state_dict().items(), again.model.state_dict().values(), strict=True):
        assert torch.equal(one, two), name
