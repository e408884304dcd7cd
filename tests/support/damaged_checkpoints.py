"""Deliberately damaged checkpoints, and both ways to load them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from deepseek_optimizer import DeepSeekConfig, load_model


def from_pretrained(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=DeepSeekConfig(backend="reference"))


both_loaders = pytest.mark.parametrize("load", [load_model, from_pretrained])


def set_config(folder: Path, **fields: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def set_tensor(folder: Path, name: str, to: Callable[[Any], torch.Tensor] | None) -> None:
    """Replaces a stored tensor by to(tensor), where the argument is None if there is no such tensor; to=None removes it."""
    tensors = load_file(folder / "model.safetensors")
    old = tensors.pop(name, None)
    if to is not None:
        tensors[name] = to(old)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
