"""Processes on several machines notice that they have different models, settings or files."""

from __future__ import annotations

import shutil

import torch
from safetensors.torch import load_file, save_file

from deepseek_optimizer import DeepSeekConfig
from deepseek_optimizer.checkpoint import open_checkpoint
from deepseek_optimizer.integration.load.same_model import fingerprint
from support.divided import save_divisible


def of(folder, **fields):
    with open_checkpoint(folder) as checkpoint:
        return fingerprint([], None, DeepSeekConfig(parallel={"pipeline": 2}, **fields), checkpoint)


def test_what_distinguishes_models(tmp_path):
    first = save_divisible(tmp_path / "first")
    same = shutil.copytree(first, tmp_path / "same")
    tensors = load_file(first / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"] + torch.eye(1, 128)[0]
    other = shutil.copytree(first, tmp_path / "other")
    save_file(tensors, other / "model.safetensors", {"format": "pt"})
    assert of(first) == of(same) == of(same, threads=3)
    assert len({of(first), of(other), of(first, precision="int8"), of(first, kv_cache="fp32")}) == 4
