"""Training runs of a second: a tiny Llama with dropout, random tokens, a checkpoint every few steps.

trainer = tiny_trainer(folder, max_steps=6, save_steps=2)
trainer.train()
fingerprint(trainer) == fingerprint(other)
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

from deepseek_optimizer.train.checkpoints import AtomicCheckpoints
from support.family_configs import llama

ROWS, LENGTH = 24, 12


class Rows(torch.utils.data.Dataset):
    """Random tokens, the same in every run."""

    def __init__(self, rows: int = ROWS, vocabulary: int = 96) -> None:
        self.ids = torch.randint(1, vocabulary, (rows, LENGTH), generator=torch.Generator().manual_seed(1))

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.ids[i], "labels": self.ids[i]}


def tiny_llama(dtype: torch.dtype = torch.float32, seed: int = 0, **fields: Any) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    fields = {"vocab_size": 96, "attention_dropout": 0.2, "num_hidden_layers": 2, **fields}
    return LlamaForCausalLM(llama(**fields)).to(dtype)


def tiny_trainer(
    folder: Path,
    model: torch.nn.Module | None = None,
    trainer: type[Trainer] = AtomicCheckpoints,
    arguments: type[TrainingArguments] = TrainingArguments,
    callbacks: list[TrainerCallback] | None = None,
    rows: int = ROWS,
    **fields: Any,
) -> Trainer:
    fields = {
        "max_steps": 8, "save_steps": 2, "per_device_train_batch_size": 2, "learning_rate": 1e-2, "warmup_steps": 2,
        "report_to": [], "disable_tqdm": True, "use_cpu": True, "logging_steps": 1, "weight_decay": 0.1, **fields,
    }  # fmt: skip
    return trainer(
        model=tiny_llama() if model is None else model,
        args=arguments(output_dir=str(folder), **fields),
        train_dataset=Rows(rows),
        eval_dataset=Rows(4),
        callbacks=callbacks,
    )


def fingerprint(trainer: Trainer) -> dict[str, Any]:
    """Copies of everything that must be the same after a resumed run."""
    return copy.deepcopy(
        {
            "weights": trainer.model.state_dict(),
            "optimizer": trainer.optimizer.state_dict(),
            "scheduler": trainer.lr_scheduler.state_dict(),
            "torch": torch.get_rng_state(),
            "losses": {log["step"]: log["loss"] for log in trainer.state.log_history if "loss" in log},
        }
    )


def differences(one: Any, two: Any, at: str = "") -> list[str]:
    """The places where two fingerprints are not bitwise equal."""
    if isinstance(one, torch.Tensor):
        same = isinstance(two, torch.Tensor) and one.dtype == two.dtype and one.shape == two.shape
        return [] if same and torch.equal(_bits(one), _bits(two)) else [at]
    if isinstance(one, np.ndarray):
        return [] if type(one) is type(two) and one.dtype == two.dtype and np.array_equal(one, two) else [at]
    if isinstance(one, dict):
        keys = [] if isinstance(two, dict) and one.keys() == two.keys() else [f"{at}: keys"]
        return keys or [result for key in one for result in differences(one[key], two[key], f"{at}/{key}")]
    if isinstance(one, (list, tuple)):
        if type(one) is not type(two) or len(one) != len(two):
            return [at]
        return [result for i, (a, b) in enumerate(zip(one, two, strict=True)) for result in differences(a, b, f"{at}/{i}")]
    return [] if type(one) is type(two) and one == two else [f"{at}: {one!r} {two!r}"]


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


class StopAt(TrainerCallback):
    """Ends a run after a step, as if it were interrupted there."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = state.global_step >= self.step
