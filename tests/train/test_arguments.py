"""`DeepSeekTrainingArguments`: the article's call, round trips, and contradictory arguments."""

from __future__ import annotations

import dataclasses
import json

import pytest
from transformers import HfArgumentParser
from transformers.training_args import OptimizerNames

from deepseek_optimizer import ConfigError, DeepSeekTrainingArguments, TrainingArguments


def test_the_articles_call(tmp_path):
    args = TrainingArguments(
        output_dir=str(tmp_path), fp8_enabled=True, fp8_e4m3=False, gradient_accumulation_steps=4, optim="adamw_deepseek"
    )
    assert isinstance(args, DeepSeekTrainingArguments)
    assert (args.optim, args.fp8_enabled, args.fp8_e4m3, args.gradient_accumulation_steps) == ("adamw_deepseek", True, False, 4)


def test_bf16_is_the_default_and_not_autocast(tmp_path):
    args = DeepSeekTrainingArguments(output_dir=str(tmp_path))
    assert args.bf16 and args.mixed_precision == "no" and args.own_optimizer
    assert not DeepSeekTrainingArguments(output_dir=str(tmp_path), bf16=False).bf16


@pytest.mark.parametrize("optim", ["adamw_deepseek", "adafactor", OptimizerNames.SGD])
def test_round_trips(tmp_path, optim):
    args = DeepSeekTrainingArguments(output_dir=str(tmp_path), optim=optim, optimizer_state="int8", learning_rate=3e-4)
    fields = json.loads(args.to_json_string())
    assert fields["optim"] == getattr(optim, "value", optim)
    assert DeepSeekTrainingArguments(**fields).to_dict() == args.to_dict()
    other = dataclasses.replace(args, optimizer_state="fp32")
    assert (other.optim, other.optimizer_state, other.learning_rate, other.bf16) == (args.optim, "fp32", 3e-4, True)
    assert f"optim={args.optim}" in repr(args) and repr(args).startswith("DeepSeekTrainingArguments(")


def test_set_optimizer(tmp_path):
    args = DeepSeekTrainingArguments(output_dir=str(tmp_path), optim="sgd")
    assert args.set_optimizer("adamw_deepseek", learning_rate=0.5).optim == "adamw_deepseek" and args.learning_rate == 0.5
    assert args.set_optimizer("adafactor").optim == OptimizerNames.ADAFACTOR


def test_command_line(tmp_path):
    parser = HfArgumentParser(DeepSeekTrainingArguments)
    (args,) = parser.parse_args_into_dataclasses(
        ["--output_dir", str(tmp_path), "--optimizer_state", "int8", "--bf16", "False"]
    )
    assert (args.optimizer_state, args.bf16, args.optim) == ("int8", False, "adamw_deepseek")


def test_gradient_checkpointing_maps_to_recompute(tmp_path):
    args = DeepSeekTrainingArguments(output_dir=str(tmp_path), gradient_checkpointing=True)
    assert args.activation_memory == "recompute"
    kept = DeepSeekTrainingArguments(output_dir=str(tmp_path), activation_memory="recompute")
    assert dataclasses.replace(kept, activation_memory="full").activation_memory == "full"


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"fp16": True}, ("fp16", "bf16")),
        ({"fp8_enabled": True, "bf16": False}, ("fp8_enabled", "bf16")),
        ({"fp8_enabled": True, "optim": "sgd"}, ("fp8_enabled", "optim")),
        ({"torch_compile": True}, ("torch_compile", "activation_memory")),
        ({"torch_compile_mode": "default"}, ("torch_compile", "activation_memory")),
        ({"use_liger_kernel": True}, ("use_liger_kernel", "fused_loss")),
        ({"deepspeed": {"zero_optimization": {"stage": 2}}}, ("deepspeed", "optim")),
        ({"gradient_checkpointing": True, "activation_memory": "full"}, ("gradient_checkpointing", "activation_memory")),
        ({"save_dtype": "fp32", "master_weights": "stochastic"}, ("save_dtype", "master_weights")),
        ({"optim_args": "a=1"}, ("optim_args", "optim")),
        ({"optim": "adamw_deepsek"}, ("optim", "'adamw_deepseek'")),
        ({"activation_memory": "selectiv"}, ("activation_memory", "'selective'")),
        ({"optimizer_state": "int4"}, ("optimizer_state", "int8")),
        ({"on_nan": None}, ("on_nan", "stop")),
        ({"fp8_backend": "gpu"}, ("fp8_backend", "hardware")),
        ({"bf16": "yes"}, ("bf16", "True or False")),
        ({"moe_balance_rate": float("nan")}, ("moe_balance_rate", "finite")),
        ({"mtp_loss_weight": -1}, ("mtp_loss_weight", "at least 0")),
        ({"draft_steps": 1, "quantize": "int4"}, ("draft_steps=1", "quantize='int4'")),
        ({"draft_steps": 17}, ("draft_steps", "from 0 to 16")),
        ({"draft_steps": 1, "mtp_loss_weight": 0.3}, ("draft_steps=1", "mtp_loss_weight=0.3")),
        ({"draft_steps": 1, "draft_vocabulary": -1}, ("draft_vocabulary", "got -1")),
        ({"draft_vocabulary": 100}, ("draft_vocabulary=100", "draft_steps")),
    ],
)
def test_rejected_arguments(tmp_path, fields, named):
    with pytest.raises(ConfigError) as caught:
        DeepSeekTrainingArguments(output_dir=str(tmp_path), **fields)
    assert all(name in str(caught.value) for name in named), caught.value
