"""A small saved model, and the same model as a whole and divided among two processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from deepseek_optimizer import load_model
from support.family_configs import qwen2
from support.models import random_model

SIZES = {
    "hidden_size": 128, "intermediate_size": 224, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32,
    "vocab_size": 301,
}  # fmt: skip


def save_divisible(folder: Path, config: Any = qwen2, **fields: Any) -> Path:
    """Saves a model whose heads, MLPs and vocabulary can be divided between tiles, though not all evenly."""
    random_model(config(**{**SIZES, **fields})).save_pretrained(folder)
    return folder


def load_divided(folder: Path, **fields: Any) -> Any:
    """The model in two processes of one thread. `close` them: they take the memory of a process each."""
    return load_model(folder, **{"parallel": {"tensor": 2}, "threads": 1, **fields})


def close(model: Any) -> None:
    """Ends the other processes of a divided model."""
    model.dso.backend.leader.close()
