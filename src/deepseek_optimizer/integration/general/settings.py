"""Which models take the general path, and which settings it cannot serve."""

from __future__ import annotations

from typing import Any

from ...config import DeepSeekConfig
from ...errors import ConfigError, UnsupportedModelError
from ...models import ENCODERS, build_encoder_graph, build_graph

# Settings that only an execution plan can serve. The others without effect here (fusion rules, chunks, batch sizes, MTP) change
# no result, and the report says that there is no plan.
NEED_A_PLAN = (
    "attention_optimization", "attention_window", "sparse_attention", "kv_cache", "kv_cache_memory",
    "batch_invariant", "context_extension", "calibration", "kl_budget",
)  # fmt: skip
_NONE = {"calibration": "none"}  # values besides the default that ask for nothing
# Of these, settings that need a plan of the whole model.
CHOOSE_FORMATS = ("context_extension", "calibration", "kl_budget")


def why_general(config: Any, strict: bool) -> str | None:
    """Why a model has no execution plan for decoding, and is loaded as on the general path; None: it has one.

    Args:
        config: the Transformers config.
        strict: raise the error instead (`DeepSeekConfig.strict`).

    Raises:
        UnsupportedModelError: `strict` is set and there is no plan at all.
        ConfigError: a field is not valid.
    """
    try:
        build_graph(config)
        return None
    except UnsupportedModelError as error:
        reason = error
    if getattr(config, "model_type", None) in ENCODERS:
        try:
            build_encoder_graph(config)
            return encoder_reason(config.model_type)
        except UnsupportedModelError as error:
            reason = error
    if strict:
        raise reason
    return str(reason)


def encoder_reason(model_type: str) -> str:
    """Why an encoder has no plan for decoding."""
    return f"{model_type} is an encoder, whose plan computes hidden states and has no cache"


def is_encoder(config: Any) -> bool:
    """Whether a model has the plan of an encoder, for its hidden states (`integration/encoder/`).

    Raises:
        ConfigError: a field is not valid.
    """
    try:
        build_encoder_graph(config)
    except UnsupportedModelError:
        return False
    return True


def check_settings(config: DeepSeekConfig, reason: str, language: bool = False) -> None:
    """Raises ConfigError if a setting needs an execution plan.

    Args:
        config: the settings.
        reason: why there is none.
        language: whether there is one for a multimodal model's language model, which most settings are for.
    """
    if (name := needs_a_plan(config, language)) is not None:
        raise ConfigError(
            f"{name}={getattr(config, name)!r} needs an execution plan for decoding, which this model does not have: leave "
            f"{name} unset. The reason: {reason}"
        )


def needs_a_plan(config: DeepSeekConfig, language: bool) -> str | None:
    """The first setting that needs an execution plan; None: there is none. `language`: as in `check_settings`."""
    default = DeepSeekConfig()
    names = CHOOSE_FORMATS if language else NEED_A_PLAN
    return next((name for name in names if getattr(config, name) not in (getattr(default, name), None, _NONE.get(name))), None)
