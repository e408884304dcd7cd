"""Facts about Transformers' modules and configs that training goes by."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn
from transformers.activations import ACT2FN
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

_SILU = (nn.SiLU, type(ACT2FN["silu"]))


def attention_name(config: Any) -> str | None:
    """Name of the attention function that a config chooses; None: the model's default."""
    name: str | None = config._attn_implementation
    return name


def set_attention_name(config: Any, name: str | None) -> None:
    """Chooses another attention function for all modules that read this config."""
    config._attn_implementation = name


def attention_function(name: str | None) -> Callable[..., Any]:
    """The attention function that is registered with Transformers under a name."""
    function: Callable[..., Any] = ALL_ATTENTION_FUNCTIONS[name]
    return function


def uses_silu(module: nn.Module) -> bool:
    """Whether the activation of a feed-forward module is SiLU."""
    return isinstance(getattr(module, "act_fn", None), _SILU)


def is_expert_parallel(module: nn.Module) -> bool:
    """Whether a module of experts holds some of the experts only, the others being in other processes."""
    return bool(getattr(module, "_is_expert_parallel", False))


def is_tied(model: Any, name: str) -> bool:
    """Whether a parameter is tied to another one, which is the one that a checkpoint stores."""
    return name in (getattr(model, "_tied_weights_keys", None) or ())
