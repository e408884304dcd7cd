"""Defaults of `dso train` that differ from Trainer's. The configuration overrides them."""

from __future__ import annotations

import math
from typing import Any

import torch
from transformers import IntervalStrategy

from .config import TrainConfig


def defaults(config: TrainConfig) -> dict[str, Any]:
    """Default arguments that do not depend on the data."""
    evaluated = {"metric_for_best_model": "eval_loss", "greater_is_better": False} if config.evaluates else {}
    return {
        "learning_rate": 1e-3 if config.arguments.get("draft_steps") else 2e-5 if config.lora is None else 2e-4,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.03,
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": config.arguments.get("per_device_train_batch_size", 2),
        "save_total_limit": 2,
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": torch.cuda.is_available(),
        "include_num_input_tokens_seen": "all" if config.data.packing else "non_padding",
        **evaluated,
    }


def intervals(config: TrainConfig, steps: int) -> dict[str, Any]:
    """Default intervals of logging, evaluation and saving.

    A run logs a hundred times, evaluates and saves at most ten times, at least ten steps apart, and ends with the best saved
    checkpoint.

    Args:
        steps: number of steps of the run.
    """
    given = config.arguments
    out: dict[str, Any] = {"logging_strategy": "steps", "logging_steps": max(1, min(10, steps // 100))}
    interval = {"steps": math.ceil(steps / min(10, max(1, steps // 10))), "strategy": "steps"}
    if config.evaluates:
        interval = {"steps": given.get("eval_steps", interval["steps"]), "strategy": given.get("eval_strategy", "steps")}
        out |= {"eval_strategy": interval["strategy"], "eval_steps": interval["steps"]}
    out |= {"save_strategy": interval["strategy"], "save_steps": interval["steps"]}
    chosen = {**out, **given}
    if config.evaluates and IntervalStrategy(chosen["save_strategy"]) == IntervalStrategy(chosen["eval_strategy"]):
        out["load_best_model_at_end"] = chosen["save_steps"] % chosen["eval_steps"] == 0
    return out
