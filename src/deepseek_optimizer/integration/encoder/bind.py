"""Binds a model with loaded packed layers: on the general path, for encoders with a plan."""

from __future__ import annotations

from typing import Any

from ...config import DeepSeekConfig
from .. import general
from .runtime import EncoderRuntime


def bind(model: Any, config: DeepSeekConfig, no_plan: str, **options: Any) -> Any:
    """`general.bind`, and for encoders the plan of the base model.

    Args:
        model, config, no_plan, options: as in `general.bind`.
    """
    if not general.is_encoder(model.config):
        return general.bind(model, config, no_plan, **options)
    general.bind(model, config, no_plan, kind=EncoderRuntime, **options)
    model.dso.attach_plan()
    return model
