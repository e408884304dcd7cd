"""Registers `attn_implementation="dso_sliding"` with Transformers, at the latest when its models are imported, which takes
seconds."""

from __future__ import annotations

from typing import Any

from ...config import DeepSeekConfig
from ...errors import ConfigError
from ..when_imported import when_imported

DSO_SLIDING = "dso_sliding"


def _register_attention(modeling_utils: Any) -> None:
    from .sliding_attention import sliding_attention

    modeling_utils.AttentionInterface.register(DSO_SLIDING, sliding_attention)


def _register_mask(masking_utils: Any) -> None:
    from .sliding_attention import sliding_mask

    masking_utils.AttentionMaskInterface.register(DSO_SLIDING, sliding_mask)


def register_attention() -> None:
    """The attention and its mask, each where it belongs; more than once does no harm."""
    when_imported("transformers.modeling_utils", "AttentionInterface", _register_attention)
    when_imported("transformers.masking_utils", "AttentionMaskInterface", _register_mask)


def check_attention_name(model_config: Any, config: DeepSeekConfig) -> None:
    """Raises ConfigError where a plan would see what the model's attention was asked to hide."""
    if getattr(model_config, "_attn_implementation", None) == DSO_SLIDING and config.attention.kind != "sliding":
        raise ConfigError(
            f'attn_implementation="{DSO_SLIDING}" is for plain Transformers models: an optimised one has '
            'DeepSeekConfig(attention_optimization="sliding", attention_window=..., attention_sinks=...)'
        )
