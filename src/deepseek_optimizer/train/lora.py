"""Adapters of low rank by PEFT: which layers get one, and a whole model made of a model and its adapter."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from typing import Any

from torch import nn

from ..errors import ConfigError, MissingPackageError

# Linear layers of attention, latent attention and dense MLPs. Not routers, indexers and heads, whose every small change changes
# what is chosen; stacked experts are no linear layers.
_TARGETS = (
    "q_proj", "k_proj", "v_proj", "o_proj", "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "gate_proj", "up_proj",
    "down_proj",
)  # fmt: skip


def check_installed() -> None:
    """
    Raises:
        MissingPackageError: PEFT is not there.
    """
    if importlib.util.find_spec("peft") is None:
        raise MissingPackageError("an adapter (LoRA)", "peft", "train")


def targets_of(model: nn.Module, wanted: str | Iterable[str] = "auto") -> list[str]:
    """Names of the linear layers that get an adapter.

    Args:
        model: weights may be on the meta device.
        wanted: "auto", or names, such as `q_proj`, of layers that the model must have.

    Raises:
        ConfigError: the model has no such layer; it lists those it has.
    """
    has = sorted({name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, nn.Linear)})
    if wanted == "auto":
        found = [name for name in _TARGETS if name in has]
        if not found:
            raise ConfigError(f"lora.targets: name the layers to train an adapter for; the model has {', '.join(has)}")
        return found
    for name in wanted:
        if name not in has:
            raise ConfigError(f"lora.targets: the model has no linear layer {name!r}; it has {', '.join(has)}")
    return list(wanted)


def add_adapter(model: Any, r: int, alpha: float | None, dropout: float, targets: list[str]) -> Any:
    """The model in PEFT's wrapper, its own weights frozen.

    Args:
        alpha: the adapter counts alpha / r times; None: twice.
    """
    from peft import LoraConfig, get_peft_model

    scale: Any = 2 * r if alpha is None else alpha
    settings = LoraConfig(r=r, lora_alpha=scale, lora_dropout=dropout, target_modules=targets, task_type="CAUSAL_LM")
    return get_peft_model(model, settings)


def merged(model: Any, base: str, adapter: str) -> Any:
    """A whole model: the trained one with its adapter merged, or, where its weights are packed, the original ones.

    Args:
        model: PEFT's, as trained.
        base: where the original weights lie.
        adapter: where the adapter is saved.
    """
    from ..integration.bind.modules import Packed

    if not any(isinstance(module, Packed) for module in model.modules()):
        return model.merge_and_unload()
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    original = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    return PeftModel.from_pretrained(original, adapter).merge_and_unload()
