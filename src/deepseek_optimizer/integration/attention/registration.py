"""Registers `attn_implementation="dso_sliding"` with Transformers."""

from __future__ import annotations

from typing import Any

from transformers import AttentionInterface, AttentionMaskInterface

from ...config import DeepSeekConfig
from ...errors import ConfigError
from .sliding_attention import sliding_attention, sliding_mask

DSO_SLIDING = "dso_sliding"


def register_attention() -> None:
    """Registers the attention function and its mask with Transformers; repeated calls are harmless."""
    AttentionInterface.register(DSO_SLIDING, sliding_attention)
    AttentionMaskInterface.register(DSO_SLIDING, sliding_mask)


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
