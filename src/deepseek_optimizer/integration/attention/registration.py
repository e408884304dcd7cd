"""Registers this package's attention functions with Transformers: "dso_sliding" for users, and "dso_native" for models without
a plan."""

from __future__ import annotations

from typing import Any

from transformers import AttentionInterface, AttentionMaskInterface

from ...config import DeepSeekConfig
from ...errors import ConfigError
from .native_attention import native_attention
from .sliding_attention import sliding_attention, sliding_mask
from .transformers_sdpa import sdpa_mask

DSO_SLIDING = "dso_sliding"
DSO_NATIVE = "dso_native"


def register_attention() -> None:
    """Registers the attention functions and their masks with Transformers; repeated calls are harmless."""
    AttentionInterface.register(DSO_SLIDING, sliding_attention)
    AttentionMaskInterface.register(DSO_SLIDING, sliding_mask)
    AttentionInterface.register(DSO_NATIVE, native_attention)
    AttentionMaskInterface.register(DSO_NATIVE, sdpa_mask)


def use_native_attention(model: Any) -> bool:
    """Lets the native library compute attention, if the model generates text, would use `sdpa`, and its class calls attention
    through Transformers' `AttentionInterface`.

    Returns: whether it does.
    """
    if model.can_generate() and model.config._attn_implementation == "sdpa" and model._can_set_attn_implementation():
        model.set_attn_implementation(DSO_NATIVE)
    return bool(model.config._attn_implementation == DSO_NATIVE)


def check_attention_name(model_config: Any, config: DeepSeekConfig) -> None:
    """Checks that a model to optimize does not ask for `dso_sliding` while its plan would use full attention.

    Raises:
        ConfigError: it does; the message names the setting to use.
    """
    if getattr(model_config, "_attn_implementation", None) == DSO_SLIDING and config.attention.kind != "sliding":
        raise ConfigError(
            f'attn_implementation="{DSO_SLIDING}" is for plain Transformers models; for an optimized model use '
            'DeepSeekConfig(attention_optimization="sliding", attention_window=..., attention_sinks=...)'
        )
