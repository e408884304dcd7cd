"""Tiny models trained for a few steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.data import Dataset

from deepseek_optimizer import DeepSeekTrainer, DeepSeekTrainingArguments


class Rows(Dataset):
    """`count` rows of `length` random ids, always the same; some labels of each are ignored."""

    def __init__(self, count: int = 16, length: int = 24, vocabulary: int = 200) -> None:
        generator = torch.Generator().manual_seed(0)
        self._ids = torch.randint(3, vocabulary, (count, length), generator=generator)

    def __len__(self) -> int:
        return len(self._ids)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        labels = self._ids[index].clone()
        labels[: index % 4] = -100
        return {"input_ids": self._ids[index], "labels": labels}


def arguments(folder: Any, **fields: Any) -> DeepSeekTrainingArguments:
    """Six steps of two rows with a log of each step, without checkpoints or output; `fields` override these."""
    base: dict[str, Any] = {
        "output_dir": str(folder), "max_steps": 6, "per_device_train_batch_size": 2, "per_device_eval_batch_size": 4,
        "logging_steps": 1, "learning_rate": 1e-2, "report_to": "none", "save_strategy": "no", "disable_tqdm": True,
        "dataloader_pin_memory": False, "lr_scheduler_type": "constant",
    }  # fmt: skip
    return DeepSeekTrainingArguments(**{**base, **fields})


def make_trainer(model: Any, folder: Any, *, trainer: Callable[..., Any] = DeepSeekTrainer, **fields: Any) -> Any:
    """A trainer on `Rows`. `fields`: arguments of the trainer, or fields of `arguments`."""
    own = ("callbacks", "compute_metrics", "compute_loss_func", "train_dataset", "eval_dataset", "data_collator",
           "optimizers", "model_init", "preprocess_logits_for_metrics", "processing_class")  # fmt: skip
    given = {name: fields.pop(name) for name in own if name in fields}
    data = {"train_dataset": Rows(), "eval_dataset": Rows(8), **given}
    return trainer(model, fields.pop("args", None) or arguments(folder, **fields), **data)


def losses(trainer: Any) -> list[float]:
    """The logged loss of each step."""
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
