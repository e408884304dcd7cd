"""Checkpoints with MTP layers, as published by DeepSeek: per-expert tensors, embedding and head repeated; those of V4 have
names of their own, and neither embedding nor head."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from deepseek_optimizer.graph.analysis import weight_shapes
from deepseek_optimizer.models import build_mtp_graph, draft_vocab_size, mtp_layers

from .models import random_model
from .v4_mtp import published_name


def mtp_tensors(config: Any, depth: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random tensors of one MTP layer by their published names, except those that it shares with the model."""
    generator = torch.Generator().manual_seed(100 * seed + depth)
    made: dict[str, torch.Tensor] = {}
    for name, shape in weight_shapes(build_mtp_graph(config, depth)).items():
        if name.endswith(("embed_tokens.weight", "shared_head.head.weight")):
            continue
        noise = torch.randn(shape, generator=generator)
        value = noise * shape[-1] ** -0.5 if len(shape) > 1 else noise * 0.2 + (0.0 if "bias" in name else 1.0)
        experts = name.removesuffix(".gate_up_proj").removesuffix(".down_proj")
        if experts == name:
            made[name] = value
            continue
        for e, matrix in enumerate(value):
            roles = zip(("gate", "up"), matrix.chunk(2), strict=True) if name.endswith("gate_up_proj") else (("down", matrix),)
            made |= {f"{experts}.{e}.{role}_proj.weight": part.contiguous() for role, part in roles}
    return made


def with_mtp(
    stored: dict[str, torch.Tensor], config: Any, *, repeated: bool = True, dtype: torch.dtype = torch.float32
) -> dict[str, torch.Tensor]:
    """A checkpoint's tensors and those of its MTP layers; `repeated`: each has a copy of the model's embedding and head."""
    stored = dict(stored)
    if config.model_type == "deepseek_v4":
        for depth in range(mtp_layers(config)):
            tensors = mtp_tensors(config, depth).items()
            stored |= {published_name(name, config.num_hidden_layers): value.to(dtype) for name, value in tensors}
        return stored
    for depth in range(mtp_layers(config)):
        exact = ("mlp.gate.weight", "e_score_correction_bias")
        tensors = mtp_tensors(config, depth).items()
        stored |= {name: value if name.endswith(exact) else value.to(dtype) for name, value in tensors}
        prefix = f"model.layers.{config.num_hidden_layers + depth}"
        head = stored.get("lm_head.weight", stored["model.embed_tokens.weight"])
        if repeated:
            stored[f"{prefix}.embed_tokens.weight"] = stored["model.embed_tokens.weight"].clone()
            stored[f"{prefix}.shared_head.head.weight"] = head.clone()
        if (size := draft_vocab_size(config)) is not None:
            tokens = draft_tokens(size, config.vocab_size, depth)
            stored[f"{prefix}.shared_head.head.weight"] = head[tokens].clone()
            stored[f"{prefix}.shared_head.tokens"] = tokens
    return stored


def draft_tokens(size: int, vocab_size: int, depth: int) -> torch.Tensor:
    """The draft vocabulary of a layer in `with_mtp`."""
    return torch.randperm(vocab_size, generator=torch.Generator().manual_seed(depth))[:size].sort().values


def save_with_mtp(folder: Path, config: Any, *, repeated: bool = True, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Saves a random model and its MTP layers, with the tensors of `with_mtp`."""
    model = random_model(config, dtype=dtype)
    model.save_pretrained(folder)
    path = folder / "model.safetensors"
    save_file(with_mtp(load_file(path), config, repeated=repeated, dtype=dtype), path, {"format": "pt"})
    return model
