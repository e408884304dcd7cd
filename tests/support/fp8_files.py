"""Checkpoints in FP8 with blocks of 128 x 128, as published by DeepSeek, made from a float one.

folder = fp8_copy(tiny_model, tmp_path / "fp8")   # attention and MLP matrices in F8_E4M3, the rest unchanged
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from deepseek_optimizer.quant import fp8

SECTION = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}


def fp8_tensors(
    tensors: dict[str, torch.Tensor], chosen: Callable[[str], bool], scale_dtype: torch.dtype = torch.float32
) -> dict[str, torch.Tensor]:
    """The same tensors, with the chosen matrices as E4M3 and their scales as further tensors."""
    out = {}
    for name, tensor in tensors.items():
        if tensor.ndim != 2 or not chosen(name):
            out[name] = tensor
            continue
        scale = fp8.quantize(tensor)[1].to(scale_dtype)
        each = fp8.expand(scale.float(), *tensor.shape)
        out[name] = (tensor.float() / each).clamp(-448, 448).to(torch.float8_e4m3fn)
        out[f"{name}_scale_inv"] = scale
    return out


def in_layers(name: str) -> bool:
    """Whether a matrix belongs to attention or an MLP, which DeepSeek stores in FP8."""
    return "_proj." in name


def fp8_copy(
    source: Path,
    target: Path,
    chosen: Callable[[str], bool] = in_layers,
    scale_dtype: torch.dtype = torch.float32,
    **section: Any,
) -> Path:
    """An FP8 copy of a float checkpoint of one file; keyword arguments change `quantization_config`."""
    shutil.copytree(source, target)
    tensors = fp8_tensors(load_file(target / "model.safetensors"), chosen, scale_dtype)
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    config = json.loads((target / "config.json").read_text())
    config["quantization_config"] = SECTION | {"modules_to_not_convert": ["lm_head"]} | section
    (target / "config.json").write_text(json.dumps(config))
    return target


def dequantized(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The values of stored FP8 tensors, float32: code times scale, implemented independently."""
    out = {}
    for name, tensor in tensors.items():
        if name.endswith("_scale_inv"):
            continue
        if tensor.dtype == torch.float8_e4m3fn:
            scale = tensors[f"{name}_scale_inv"].float()
            rows, cols = torch.arange(tensor.shape[0]) // 128, torch.arange(tensor.shape[1]) // 128
            tensor = tensor.float() * scale[rows][:, cols]
        out[name] = tensor
    return out
