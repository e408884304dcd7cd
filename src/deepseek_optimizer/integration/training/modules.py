"""Facts about Transformers' modules and configs that training depends on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn
from transformers.activations import ACT2FN
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

_SILU = (nn.SiLU, type(ACT2FN["silu"]))


def attention_name(config: Any) -> str | None:
    """Name of the attention function in a config; None: the model's default."""
    name: str | None = config._attn_implementation
    return name


def set_attention_name(config: Any, name: str | None) -> None:
    """Sets the attention function of all modules that use this config."""
    config._attn_implementation = name


def attention_function(name: str | None) -> Callable[..., Any]:
    """The attention function registered with Transformers under `name`."""
    function: Callable[..., Any] = ALL_ATTENTION_FUNCTIONS[name]
    return function


def uses_silu(module: nn.Module) -> bool:
    """Whether a feed-forward module computes silu(gate) * up, where gate and up may be limited as in `silu_limit`."""
    plain = getattr(module, "limit", None) is None or silu_limit(module) is not None
    return isinstance(getattr(module, "act_fn", None), _SILU) and plain


def silu_limit(module: nn.Module) -> float | None:
    """The limit c in silu(min(gate, c)) * clamp(up, -c, c), as in DeepSeek-V4; None: there is none. Modules of other families
    with a `limit` have other formulas."""
    if not _is_v4(module):
        return None
    limit: float | None = getattr(module, "limit", None)
    return limit


def norm_keeps_dtype(module: nn.Module) -> bool:
    """Whether a norm's result has the dtype of its input, whatever its weight's. It is computed in fp32 and rounded once."""
    return _is_v4(module)


def _is_v4(module: nn.Module) -> bool:
    return any(own.__name__.startswith("DeepseekV4") for own in type(module).__mro__)


def is_expert_parallel(module: nn.Module) -> bool:
    """Whether a module of experts holds only some of the experts, with the others in other processes."""
    return bool(getattr(module, "_is_expert_parallel", False))


def is_tied(model: Any, name: str) -> bool:
    """Whether a parameter is tied to another one and therefore not stored in checkpoints."""
    return name in (getattr(model, "_tied_weights_keys", None) or ())
