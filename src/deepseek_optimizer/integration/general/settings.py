"""Which models take the general path, and which settings it cannot serve."""

from __future__ import annotations

from typing import Any

from ...config import DeepSeekConfig
from ...errors import ConfigError, UnsupportedModelError
from ...models import build_graph

# Settings that only an execution plan can serve. The others without effect here (fusion rules, chunks, batch sizes, MTP) change
# no result, and the report says that there is no plan.
NEED_A_PLAN = (
    "attention_optimization", "attention_window", "sparse_attention", "kv_cache", "kv_cache_memory",
    "batch_invariant", "context_extension", "calibration", "kl_budget",
)  # fmt: skip


def why_general(config: Any, strict: bool) -> str | None:
    """Why a model has no execution plan and takes the general path; None: it has one.

    Args:
        config: the Transformers config.
        strict: raise the error instead (`DeepSeekConfig.strict`).

    Raises:
        UnsupportedModelError: `strict` is set and there is no plan.
        ConfigError: a field is not valid.
    """
    try:
        build_graph(config)
    except UnsupportedModelError as error:
        if strict:
            raise
        return str(error)
    return None


def check_settings(config: DeepSeekConfig, reason: str) -> None:
    """Raises ConfigError if a setting needs an execution plan. `reason`: why there is none."""
    default = DeepSeekConfig()
    for name in NEED_A_PLAN:
        if (value := getattr(config, name)) != getattr(default, name):
            raise ConfigError(
                f"{name}={value!r} needs an execution plan, and this model takes the general path: leave {name} unset. The "
                f"reason: {reason}"
            )
