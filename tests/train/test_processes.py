"""Two processes train together: DDP and FSDP2 through accelerate, gloo on the CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

from deepseek_optimizer.train.arguments import DeepSeekTrainingArguments
from deepseek_optimizer.train.checkpoints.manifest import verify
from deepseek_optimizer.train.checkpoints.state import read_state
from deepseek_optimizer.train.trainer import DeepSeekTrainer
from support.processes import in_processes
from support.train_runs import StopAt, differences, tiny_llama, tiny_trainer

FSDP = {"fsdp": True, "fsdp_config": {"version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}}
WAYS = [pytest.param({}, id="ddp"), pytest.param(FSDP, id="fsdp2")]


def run(
    folder: Path, rows: int, resume: bool = False, stop: int | None = None, width: int = 48, tied: bool = False, **fields: Any
) -> list[float]:
    """Losses of six steps on batches of some rows per process."""
    fields = {
        "max_steps": 6, "save_steps": 3, "save_strategy": "steps", "per_device_train_batch_size": rows, "bf16": False,
        "seed": 3, "learning_rate": 1e-3, **fields,
    }  # fmt: skip
    callbacks = [] if stop is None else [StopAt(stop)]
    trainer = tiny_trainer(
        folder,
        tiny_llama(attention_dropout=0.0, hidden_size=width, tie_word_embeddings=tied),
        DeepSeekTrainer,
        DeepSeekTrainingArguments,
        callbacks,
        **fields,
    )
    trainer.train(resume_from_checkpoint=resume)
    sharded = any(isinstance(parameter, DTensor) for parameter in trainer.model.parameters())
    assert sharded == bool(fields.get("fsdp")), "accelerate alone always uses DDP on CPUs"
    return [log["loss"] for log in trainer.state.log_history if "loss" in log]


def weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(checkpoint).state_dict()


@pytest.mark.parametrize("accumulated", [1, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("way", WAYS)
def test_two_processes_equal_one_with_twice_the_batch(tmp_path: Path, way: dict[str, Any], accumulated: int) -> None:
    """The same data in the same order give the same losses and weights, up to the order of fp32 sums."""
    fields = {"gradient_accumulation_steps": accumulated, "optimizer_state": "fp32"}  # no stochastic rounding
    alone = run(tmp_path / "one", rows=4, **fields)
    together = in_processes(lambda rank: run(tmp_path / "two", rows=2, **fields, **way))
    assert together[0] == together[1] and len(alone) == 6 and alone[-1] < alone[0]
    torch.testing.assert_close(torch.tensor(together[0]), torch.tensor(alone), rtol=1e-5, atol=0)
    verify(tmp_path / "two" / "checkpoint-6")
    one, two = (weights(tmp_path / name / "checkpoint-6") for name in ("one", "two"))
    for name, expected in one.items():
        torch.testing.assert_close(two[name], expected, rtol=0, atol=2e-5, msg=name)


@pytest.mark.parametrize("way", WAYS)
def test_resumed_together_is_exact(tmp_path: Path, way: dict[str, Any]) -> None:
    """bf16 with split masters: weights, moments and masters, gathered if they are sharded."""
    fields = {"rows": 2, "bf16": True, "tied": bool(way), **way}
    in_processes(lambda rank: run(tmp_path / "straight", **fields))
    in_processes(lambda rank: run(tmp_path / "again", stop=3, **fields))
    in_processes(lambda rank: run(tmp_path / "again", resume=True, **fields))
    straight, again = (tmp_path / name / "checkpoint-6" for name in ("straight", "again"))
    assert differences(weights(straight), weights(again)) == []
    for file in ("optimizer", "scheduler", "rng_state_0", "rng_state_1"):
        assert differences(read_state(straight / f"{file}.safetensors"), read_state(again / f"{file}.safetensors")) == [], file
    shapes = {tuple(state["master_low"].shape) for state in read_state(again / "optimizer.safetensors")["state"].values()}
    assert shapes == {tuple(weight.shape) for weight in weights(again).values()}, "a shard was saved"


def test_an_fsdp_checkpoint_resumes_in_one_process(tmp_path: Path) -> None:
    in_processes(lambda rank: run(tmp_path, rows=2, max_steps=3, **FSDP))
    assert len(run(tmp_path, rows=4, resume=True)) == 6


def test_int8_moments_cannot_be_sharded(tmp_path: Path) -> None:
    def refused(rank: int) -> str:
        try:
            run(tmp_path, rows=2, max_steps=3, width=96, optimizer_state="int8", **FSDP)
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        return "no error"

    for error in in_processes(refused):
        assert error.startswith("ConfigError") and "optimizer_state" in error
