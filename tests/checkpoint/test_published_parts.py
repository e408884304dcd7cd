"""Parameters that published checkpoints store in several tensors (Kimi Linear's convolutions)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from deepseek_optimizer import CheckpointError, load_model
from deepseek_optimizer.checkpoint import open_checkpoint
from support.family_configs import kimi_linear
from support.models import assert_close_rows, random_ids, random_model, transformers_logits


def test_parts_are_joined_in_order(tmp_path: Path) -> None:
    model = random_model(kimi_linear())
    model.save_pretrained(tmp_path)  # in the published form
    assert any("q_conv1d" in name for name in load_file(tmp_path / "model.safetensors"))
    with open_checkpoint(tmp_path) as checkpoint:
        name = "model.layers.0.self_attn.conv1d.weight"
        assert torch.equal(checkpoint.read(name), model.get_parameter(name).data)
        assert not any("q_conv1d" in stored for stored in checkpoint.tensors)
    ids = random_ids(model.config, 40)
    loaded = load_model(tmp_path, precision="fp32", backend="reference")
    with torch.no_grad():
        assert_close_rows(loaded(torch.tensor([ids]), use_cache=False).logits[0], transformers_logits(model, ids))


def test_a_missing_part_is_named(tmp_path: Path) -> None:
    random_model(kimi_linear()).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.2.self_attn.k_conv1d.weight"]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"layers\.2\.self_attn\.conv1d\.weight.*parts of one kind"):
        open_checkpoint(tmp_path)
