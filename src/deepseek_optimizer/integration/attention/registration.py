"""Registers `attn_implementation="dso_sliding"` with Transformers."""

from __future__ import annotations

from typing import Any

from transformers import AttentionInterface, AttentionMaskInterface

from ...config import DeepSeekConfig
from ...errors import ConfigError
from .sliding_attention import sliding_attention, sliding_mask

DSO_SLIDING = "dso_sliding"


def register_attention() -> None:
    """Registers the attention function and its mask; may be called more than once."""
    AttentionInterface.register(DSO_SLIDING, sliding_attention)
    AttentionMaskInterface.register(DSO_SLIDING, sliding_mask)


def check_attention_name(model_config: Any, config: DeepSeekConfig) -> None:
    """Raises ConfigError where a plan would see what the model's attention was asked to hide."""
    if getattr(model_config, "_attn_implementation", None) == DSO_SLIDING and config.attention.kind != "sliding":
        raise ConfigError(
            f'attn_implementation="{DSO_SLIDING}" is for plain Transformers models: an optimised one has '
            'DeepSeekConfig(attention_optimization="sliding", attention_window=..., attention_sinks=...)'
        )
