"""Two processes train together: DDP and FSDP2 through accelerate, gloo on the CPU."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, TrainerCallback

from deepseek_optimizer.train.arguments import DeepSeekTrainingArguments
from deepseek_optimizer.train.checkpoints.manifest import verify
from deepseek_optimizer.train.checkpoints.state import read_state
from deepseek_optimizer.train.trainer import DeepSeekTrainer
from support.processes import in_processes
from support.train_runs import Rows, StopAt, differences, tiny_llama, tiny_trainer

FSDP = {"fsdp": True, "fsdp_config": {"version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}}
WAYS = [pytest.param({}, id="ddp"), pytest.param(FSDP, id="fsdp2")]


def run(
    folder: Path,
    rows: int,
    resume: bool = False,
    stop: int | None = None,
    width: int = 48,
    tied: bool = False,
    callbacks: Sequence[TrainerCallback] = (),
    **fields: Any,
) -> list[float]:
    """Losses of six steps on batches of some rows per process."""
    fields = {
        "max_steps": 6, "save_steps": 3, "save_strategy": "steps", "per_device_train_batch_size": rows, "bf16": False,
        "seed": 3, "learning_rate": 1e-3, **fields,
    }  # fmt: skip
    callbacks = [*callbacks, *([] if stop is None else [StopAt(stop)])]
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


def test_int8_moments_of_shards_are_resumed(tmp_path: Path) -> None:
    """By the same processes bit for bit; by one process with rounded moments where its blocks are not those of the shards."""
    fields = {"rows": 2, "width": 96, "bf16": True, "optimizer_state": "int8", **FSDP}
    straight = in_processes(lambda rank: run(tmp_path / "straight", **fields))[0]
    in_processes(lambda rank: run(tmp_path / "again", stop=3, **fields))
    in_processes(lambda rank: run(tmp_path / "again", resume=True, **fields))
    states = [read_state(tmp_path / name / "checkpoint-6" / "optimizer.safetensors") for name in ("straight", "again")]
    assert differences(*states) == []
    for kind in ("exp_avg_scale", "exp_avg_root"):
        assert any(kind in state for state in states[0]["state"].values()), "the shapes are not of both kinds"
    shutil.rmtree(tmp_path / "again" / "checkpoint-6")
    alone = run(tmp_path / "again", rows=4, resume=True, width=96, bf16=True, optimizer_state="int8")
    torch.testing.assert_close(torch.tensor(alone), torch.tensor(straight), rtol=1e-2, atol=0)


def test_passes_are_summed_in_fp32_over_processes(tmp_path: Path) -> None:
    """In bf16: four passes of one process, or two of each of two, give the same sums but for their order."""

    def gradients(folder: Path, passes: int) -> list[list[float]]:
        found = []

        class Record(TrainerCallback):
            def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
                found.extend(parameter.main_grad.flatten().tolist() for parameter in model.parameters())

        fields = {"rows": 2, "bf16": True, "gradient_accumulation_steps": passes, "max_steps": 1, "callbacks": [Record()]}
        run(folder, **fields)
        return found

    alone, (together, _) = gradients(tmp_path / "one", 4), in_processes(lambda rank: gradients(tmp_path / "two", 2))
    assert len(alone) == len(together) > 10
    for one, two in zip(alone, together, strict=True):
        torch.testing.assert_close(torch.tensor(two), torch.tensor(one), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("rows", [1, 3, 5])
def test_rows_that_fill_the_last_batch_are_not_evaluated_twice(tmp_path: Path, rows: int) -> None:
    """So that both processes have as many, accelerate gives them rows of the beginning again."""
    tiny_llama(seed=1, attention_dropout=0.0).save_pretrained(tmp_path / "teacher")

    def evaluate(folder: str) -> float:
        fields = {"teacher": str(tmp_path / "teacher"), "per_device_eval_batch_size": 2, "bf16": False}
        trainer = tiny_trainer(
            tmp_path / folder, tiny_llama(attention_dropout=0.0), DeepSeekTrainer, DeepSeekTrainingArguments, **fields
        )
        return float(trainer.evaluate(Rows(rows))["eval_kl"])

    alone, together = evaluate("one"), in_processes(lambda rank: evaluate("two"))
    assert together == pytest.approx([alone, alone], rel=1e-6)


def test_an_fsdp_checkpoint_resumes_in_one_process(tmp_path: Path) -> None:
    in_processes(lambda rank: run(tmp_path, rows=2, max_steps=3, **FSDP))
    assert len(run(tmp_path, rows=4, resume=True)) == 6
