"""Where a run of `dso train` differs from Trainer's defaults, as far as its description does not say otherwise."""

from __future__ import annotations

import math
from typing import Any

import torch
from transformers import IntervalStrategy

from .config import TrainConfig


def defaults(config: TrainConfig) -> dict[str, Any]:
    """Arguments that are known before the data is."""
    evaluated = {"metric_for_best_model": "eval_loss", "greater_is_better": False} if config.evaluates else {}
    return {
        "learning_rate": 2e-5 if config.lora is None else 2e-4,
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


def rhythm(config: TrainConfig, steps: int) -> dict[str, Any]:
    """Logs a hundred times, evaluates and saves up to ten times in a run, ten steps apart or more, and ends with the best of
    what was saved."""
    said = config.arguments
    out: dict[str, Any] = {"logging_strategy": "steps", "logging_steps": max(1, min(10, steps // 100))}
    often = {"steps": math.ceil(steps / min(10, max(1, steps // 10))), "strategy": "steps"}
    if config.evaluates:
        often = {"steps": said.get("eval_steps", often["steps"]), "strategy": said.get("eval_strategy", "steps")}
        out |= {"eval_strategy": often["strategy"], "eval_steps": often["steps"]}
    out |= {"save_strategy": often["strategy"], "save_steps": often["steps"]}
    made = {**out, **said}
    if config.evaluates and IntervalStrategy(made["save_strategy"]) == IntervalStrategy(made["eval_strategy"]):
        out["load_best_model_at_end"] = made["save_steps"] % made["eval_steps"] == 0
    return out
