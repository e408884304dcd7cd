"""LoRA adapters as PEFT saves them, for random models, and PEFT's own results."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import peft
import torch


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


def adapted(model: Any, folder: Path | None) -> Any:
    """The model with an adapter, by PEFT; None: without."""
    twin = copy.deepcopy(model)
    return twin if folder is None else peft.PeftModel.from_pretrained(twin, folder).eval()


@torch.no_grad()
def logits_of(model: Any, ids: Sequence[int]) -> torch.Tensor:
    """float32 [T, V], by Transformers."""
    logits: torch.Tensor = model(torch.tensor([list(ids)])).logits[0].float()
    return logits
