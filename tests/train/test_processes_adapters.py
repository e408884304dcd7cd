"""Two processes train an adapter with sharded weights: a resumed run equals an uninterrupted one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from deepseek_optimizer.errors import CheckpointError
from deepseek_optimizer.train.arguments import DeepSeekTrainingArguments
from deepseek_optimizer.train.checkpoints.sharded_weights import load_shards
from deepseek_optimizer.train.checkpoints.state import read_state
from deepseek_optimizer.train.trainer import DeepSeekTrainer
from support.processes import in_processes
from support.train_runs import StopAt, differences, tiny_llama, tiny_trainer

peft = pytest.importorskip("peft")


def adapted() -> torch.nn.Module:
    """The embedding is trained as a whole, as PEFT does with `modules_to_save`."""
    model = tiny_llama(torch.bfloat16, attention_dropout=0.0)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], modules_to_save=["embed_tokens"], task_type="CAUSAL_LM")
    torch.manual_seed(0)
    return peft.get_peft_model(model, config)


def run(folder: Path, resume: bool = False, stop: int | None = None, rows: int = 2, sharded: bool = True) -> list[float]:
    fields = {"max_steps": 4, "save_steps": 2, "per_device_train_batch_size": rows, "seed": 3}
    fields |= {"fsdp": True, "fsdp_config": {"version": 2}} if sharded else {}
    callbacks = [] if stop is None else [StopAt(stop)]
    trainer = tiny_trainer(folder, adapted(), DeepSeekTrainer, DeepSeekTrainingArguments, callbacks, **fields)
    trainer.train(resume_from_checkpoint=resume)
    return [log["loss"] for log in trainer.state.log_history if "loss" in log]


def test_resumed_adapters_of_sharded_models_are_exact(tmp_path: Path) -> None:
    in_processes(lambda rank: run(tmp_path / "straight"))
    in_processes(lambda rank: run(tmp_path / "again", stop=2))
    in_processes(lambda rank: run(tmp_path / "again", resume=True))
    straight, again = (tmp_path / name / "checkpoint-4" for name in ("straight", "again"))
    weights = [load_file(folder / "adapter_model.safetensors") for folder in (straight, again)]
    assert any("embed_tokens" in name for name in weights[0]) and differences(*weights) == []
    states = [read_state(folder / "optimizer.safetensors") for folder in (straight, again)]
    assert states[0]["state"] and differences(*states) == []


def test_a_checkpoint_of_another_adapter_is_refused(tmp_path: Path) -> None:
    model = adapted()
    model.save_pretrained(tmp_path)
    other = peft.get_peft_model(tiny_llama(torch.bfloat16), peft.LoraConfig(r=4, target_modules=["q_proj"]))
    with pytest.raises(CheckpointError, match="0 tensors are missing, 5 are unexpected"):
        load_shards(tmp_path, other)
    (tmp_path / "adapter_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="not a checkpoint of an adapter"):
        load_shards(tmp_path, model)
