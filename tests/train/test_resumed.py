"""A resumed run of `DeepSeekTrainer` equals an uninterrupted one bit for bit: weights, masters, moments, losses."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from deepseek_optimizer.train.arguments import DeepSeekTrainingArguments
from deepseek_optimizer.train.trainer import DeepSeekTrainer
from support.train_runs import StopAt, differences, fingerprint, tiny_llama, tiny_trainer


def lora() -> torch.nn.Module:
    peft = pytest.importorskip("peft")
    model = tiny_llama(torch.bfloat16)
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], lora_dropout=0.1, task_type="CAUSAL_LM")
    return peft.get_peft_model(model, config)


@pytest.mark.parametrize(
    ("fields", "make"),
    [
        ({"gradient_accumulation_steps": 2, "optimizer_state": "int8"}, tiny_llama),
        ({"master_weights": "stochastic", "activation_memory": "recompute"}, tiny_llama),
        ({"packing": True}, lambda: tiny_llama(attention_dropout=0.0, max_position_embeddings=40)),
        ({"gradient_accumulation_steps": 2}, lora),
        ({"bf16": False}, tiny_llama),
    ],
    ids=["accumulation-int8", "stochastic-recompute", "packing", "lora", "fp32"],
)
def test_resumed_equals_uninterrupted(tmp_path: Path, fields, make) -> None:
    def run(folder: Path, resume: bool = False, stop: int | None = None):
        callbacks = [] if stop is None else [StopAt(stop)]
        common = {"max_steps": 5, "save_steps": 3, "learning_rate": 1e-2, **fields}
        trainer = tiny_trainer(folder, make(), DeepSeekTrainer, DeepSeekTrainingArguments, callbacks, **common)
        trainer.train(resume_from_checkpoint=resume)
        return fingerprint(trainer)

    straight = run(tmp_path / "straight")
    run(tmp_path / "run", stop=3)
    torch.manual_seed(9)
    again = run(tmp_path / "run", resume=True)
    assert len(straight["losses"]) == 5 and straight["optimizer"]["state"]
    assert differences(straight, again) == []
