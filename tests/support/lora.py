"""LoRA adapters as PEFT saves them, for random models, and PEFT's own results."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import peft
import torch
from safetensors.torch import save_file


def save_adapter(
    model: Any,
    folder: Path,
    *,
    seed: int = 0,
    targets: Sequence[str] = ("q_proj", "v_proj", "o_proj", "down_proj"),
    **options: Any,
) -> Path:
    """Saves an adapter with random matrices. `options`: further fields of LoraConfig."""
    torch.manual_seed(seed)
    config = peft.LoraConfig(
        **{"r": 4, "lora_alpha": 16, "target_modules": list(targets), "init_lora_weights": False, "task_type": "CAUSAL_LM"}
        | options
    )
    peft.get_peft_model(copy.deepcopy(model), config).save_pretrained(folder)
    return folder


def random_adapter(model: Any, folder: Path, *, seed: int = 0, rank: int = 4, size: float = 0.02) -> Path:
    """Writes an adapter with random matrices for every linear module of an optimized model."""
    generator, tensors = torch.Generator().manual_seed(seed), {}
    for site in model.dso.adapter_graph(rank).adapter_sites:
        prefix, (outputs, inputs) = f"base_model.model.{site.module}", site.module_shape
        tensors[f"{prefix}.lora_A.weight"] = torch.randn(rank, inputs, generator=generator) * inputs**-0.5
        tensors[f"{prefix}.lora_B.weight"] = torch.randn(outputs, rank, generator=generator) * size
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": rank, "lora_alpha": rank}))
    return folder


def adapted(model: Any, folder: Path | None) -> Any:
    """The model with an adapter, by PEFT; None: without."""
    twin = copy.deepcopy(model)
    return twin if folder is None else peft.PeftModel.from_pretrained(twin, folder).eval()


@torch.no_grad()
def logits_of(model: Any, ids: Sequence[int]) -> torch.Tensor:
    """float32 [T, V], by Transformers."""
    logits: torch.Tensor = model(torch.tensor([list(ids)])).logits[0].float()
    return logits
