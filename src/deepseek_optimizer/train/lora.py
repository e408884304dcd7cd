"""Low-rank adapters (LoRA) by PEFT: choosing the layers, adding adapters and merging them."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from typing import Any

from torch import nn

from ..errors import ConfigError, MissingPackageError

# Linear layers of attention, latent attention and MLPs. Routers, indexers and heads are excluded, since small changes there
# change discrete choices.
_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj", "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj")
_MLP = ("gate_proj", "up_proj", "down_proj")


def check_installed() -> None:
    """Checks that PEFT is installed.

    Raises:
        MissingPackageError: it is not.
    """
    if importlib.util.find_spec("peft") is None:
        raise MissingPackageError("an adapter (LoRA)", "peft", "train")


def targets_of(model: nn.Module, wanted: str | Iterable[str] = "auto") -> list[str]:
    """Names of the linear layers to adapt.

    Args:
        model: its weights may be on the meta device.
        wanted: "auto", or names of linear layers of the model, such as `q_proj`. "auto" leaves out the MLPs of models with
            routed experts: PEFT takes their names as names of the experts' stacked weights, in place of the linear layers.

    Raises:
        ConfigError: the model has no such layer, or the name is that of packed experts. Lists those that it has.
    """
    experts = [p for name, p in model.named_parameters() if ".experts." in name and p.dim() >= 3]
    available = sorted({name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, nn.Linear)})
    if wanted == "auto":
        targets = [name for name in (*_ATTENTION, *(() if experts else _MLP)) if name in available]
        if not targets:
            raise ConfigError(f"lora.targets: the model has none of the usual layers; name some of {', '.join(available)}")
        return targets
    for name in wanted:
        if name not in available:
            raise ConfigError(f"lora.targets: the model has no linear layer {name!r}; it has {', '.join(available)}")
        if name in _MLP and any(not p.is_floating_point() for p in experts):
            raise ConfigError(
                f"lora.targets: PEFT takes {name!r} as the name of the experts' weights, which are packed; leave it out, or "
                "train without precision"
            )
    return list(wanted)


def add_adapter(model: Any, r: int, alpha: float | None, dropout: float, targets: list[str]) -> Any:
    """Wraps a model with a PEFT adapter and freezes the model's own weights.

    Args:
        r: rank of the adapter.
        alpha: the adapter is scaled by alpha / r; None: 2 r.
        dropout: probability of dropping an input of the adapter.
        targets: names of the linear layers to adapt.
    """
    from peft import LoraConfig, get_peft_model

    scale: Any = 2 * r if alpha is None else alpha
    settings = LoraConfig(r=r, lora_alpha=scale, lora_dropout=dropout, target_modules=targets, task_type="CAUSAL_LM")
    return get_peft_model(model, settings)


def merged(model: Any, base: str, adapter: str) -> Any:
    """The whole model with its adapter merged. If the model's weights are packed, the adapter is merged into the original ones.

    Args:
        model: the trained PEFT model.
        base: directory or name of the original model.
        adapter: directory of the saved adapter.
    """
    from ..integration.bind.modules import Packed

    if not any(isinstance(module, Packed) for module in model.modules()):
        return model.merge_and_unload()
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    original = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    return PeftModel.from_pretrained(original, adapter).merge_and_unload()
