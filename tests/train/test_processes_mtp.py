"""Two processes train layers that draft: losses equal those of one process with the whole batch, also with sharded weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from deepseek_optimizer.train.arguments import DeepSeekTrainingArguments
from deepseek_optimizer.train.trainer import DeepSeekTrainer
from support.family_configs import deepseek_v3
from support.models import random_model
from support.processes import in_processes
from support.train_runs import Rows, StopAt, differences, tiny_llama, tiny_trainer

FSDP = {"fsdp": True, "fsdp_config": {"version": 2}}
COMMON = {"bf16": False, "optimizer_state": "fp32", "learning_rate": 1e-3, "seed": 3, "save_strategy": "no"}


def trainer(folder: Path, rows: int, stop: int | None = None, **fields: Any) -> DeepSeekTrainer:
    if "mtp_loss_weight" in fields:
        torch.manual_seed(0)
        model = random_model(deepseek_v3(num_nextn_predict_layers=1)).float()
    else:
        model = tiny_llama(attention_dropout=0.0)
    callbacks = [] if stop is None else [StopAt(stop)]
    fields = {**COMMON, "per_device_train_batch_size": rows, "per_device_eval_batch_size": rows, **fields}
    return tiny_trainer(folder, model, DeepSeekTrainer, DeepSeekTrainingArguments, callbacks, **fields)


def logged(folder: Path, rows: int, **fields: Any) -> list[float]:
    """What a run of three steps and its evaluation log, and whether the loss is fused."""
    made = trainer(folder, rows, max_steps=3, eval_strategy="steps", eval_steps=3, **fields)
    made.train()
    names = ("loss", "mtp_loss", "eval_loss", "eval_accepted")
    return [float(made.report().fused_loss), *(log[name] for log in made.state.log_history for name in names if name in log)]


@pytest.mark.parametrize(
    "fields",
    [
        pytest.param({"draft_steps": 2, "draft_vocabulary": 40}, id="draft-ddp"),
        pytest.param({"draft_steps": 2, "draft_vocabulary": 40, **FSDP}, id="draft-fsdp2"),
        pytest.param({"mtp_loss_weight": 0.3, "activation_memory": "recompute", **FSDP}, id="mtp-fsdp2"),
    ],
)
def test_two_processes_equal_one_with_twice_the_batch(tmp_path: Path, fields: dict[str, Any]) -> None:
    """A draft vocabulary gives the layer a head of its own."""
    alone = logged(tmp_path / "one", 4, **{name: value for name, value in fields.items() if not name.startswith("fsdp")})
    together = in_processes(lambda rank: logged(tmp_path / "two", 2, **fields))
    assert together[0] == together[1] and len(alone) > 4 and alone[0] == 1.0
    torch.testing.assert_close(torch.tensor(together[0]), torch.tensor(alone), rtol=1e-5, atol=1e-4)


def test_rows_that_fill_the_last_batch_are_not_evaluated_twice(tmp_path: Path) -> None:
    """So that both processes have as many, accelerate gives them rows of the beginning again."""

    def accepted(folder: str) -> float:
        made = trainer(tmp_path / folder, 2, draft_steps=2)
        made.fit_draft_layer()
        made.evaluate(Rows(3))
        return float(made.state.log_history[-1]["eval_accepted"])

    alone, together = accepted("one"), in_processes(lambda rank: accepted("two"))
    assert alone > 0 and together == [alone, alone]


def test_resumed_with_sharded_experts_is_exact(tmp_path: Path) -> None:
    """Checkpoints have a tensor for each expert; the model, one of all experts."""

    def run(folder: Path, resume: bool = False, stop: int | None = None) -> None:
        fields = {"bf16": True, "max_steps": 3, "save_strategy": "steps", "save_steps": 2, "mtp_loss_weight": 0.3, **FSDP}
        trainer(folder, 2, stop, **fields).train(resume_from_checkpoint=resume)

    from safetensors.torch import load_file

    in_processes(lambda rank: run(tmp_path / "straight"))
    in_processes(lambda rank: run(tmp_path / "again", stop=2))
    in_processes(lambda rank: run(tmp_path / "again", resume=True))
    straight, again = (load_file(tmp_path / name / "checkpoint-3" / "model.safetensors") for name in ("straight", "again"))
    assert any(".experts.0." in name for name in straight) and differences(straight, again) == []
