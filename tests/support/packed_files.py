"""Packed checkpoints made from tensors, without a model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from deepseek_optimizer.checkpoint.manifest import KEY, Manifest
from deepseek_optimizer.checkpoint.packed import write_safetensors
from deepseek_optimizer.quant import QUANT_METHOD, PackedWeight


def packed_fields(tensors: Mapping[str, PackedWeight | torch.Tensor], **settings: Any) -> dict[str, Any]:
    """The fields of config.json about these tensors, in addition to the model's own."""
    return {"quantization_config": {"quant_method": QUANT_METHOD, **settings}, KEY: Manifest.of(tensors).to_dict()}


def save_packed(
    directory: Path, config: Mapping[str, Any], tensors: Mapping[str, PackedWeight | torch.Tensor], **settings: Any
) -> None:
    """Writes a packed checkpoint with these tensors into a new directory."""
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps({**config, **packed_fields(tensors, **settings)}))
    write_safetensors(directory / "model.safetensors", tensors)
