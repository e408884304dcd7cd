"""Extends the context beyond the trained length by RoPE scaling: YaRN (Peng et al. 2023) or dynamic NTK scaling.

The Transformers config describes it completely: `rope_parameters`, and for YaRN also `max_position_embeddings`. (The formula of
dynamic scaling reads the trained length from `max_position_embeddings`, which therefore stays; the context is `factor` times as
long.) The config is changed before a model is created from it; the graph and Transformers' modules follow it, and a saved model
loads with the same extension.
"""

from __future__ import annotations

import copy
from typing import Any

import torch

from ...config import DeepSeekConfig
from ...errors import ConfigError
from .graphs import plan_graph


def extend_context(config: Any, settings: DeepSeekConfig) -> None:
    """Applies `settings.context_extension` to a Transformers config, in place; a second call changes nothing.

    Raises:
        ConfigError: `context_length` is missing or not above the trained length, or the config already scales its RoPE, or has
            several or none.
    """
    if settings.context_extension is None:
        return
    kind, length = settings.context_extension, settings.context_length
    given = dict(getattr(config, "rope_parameters", None) or {})
    if not given:
        raise ConfigError(
            f"context_extension={kind!r}: a {config.model_type} model has no rotary position embeddings to scale; leave it out"
        )
    if any(isinstance(value, dict) for value in given.values()):
        raise ConfigError(
            f"context_extension={kind!r}: the layers of a {config.model_type} model have different rotary position embeddings, "
            "which cannot be extended; leave it out"
        )
    if length is None:
        raise ConfigError(f"context_extension={kind!r} needs context_length, the new maximum in tokens")
    if given.get("rope_type", "default") != "default":
        original = given.get("original_max_position_embeddings") if kind == "yarn" else config.max_position_embeddings
        if original and given == _extended(config, _unscaled(given), kind, length, original):
            return
        raise ConfigError(
            f"context_extension={kind!r}: the model's config already scales its RoPE (rope_type {given['rope_type']!r}, "
            f"max_position_embeddings {config.max_position_embeddings}), which is possible only once; leave it out"
        )
    trained = config.max_position_embeddings
    if length <= trained:
        raise ConfigError(
            f"context_length={length} does not exceed the {trained} tokens the model was trained for; set a larger length, or "
            f"leave context_extension={kind!r} out"
        )
    config.rope_parameters = _extended(config, given, kind, length, trained)
    if kind == "yarn":
        config.max_position_embeddings = length


def extended(config: Any, settings: DeepSeekConfig) -> Any:
    """A copy of a Transformers config with the extension applied; without an extension, `config` itself.

    Raises: the errors of `extend_context` and `plan_graph`.
    """
    if settings.context_extension is None:
        return config
    twin = copy.deepcopy(config)
    extend_context(twin, settings)
    plan_graph(twin, ())
    return twin


def extend_model(model: Any, settings: DeepSeekConfig) -> None:
    """Applies the extension to an existing model: its config, its rotary embeddings and its attention scale.

    Raises:
        ConfigError: see `extend_context`; the model is unchanged.
    """
    if settings.context_extension is None:
        return
    before = dict(getattr(model.config, "rope_parameters", None) or {})
    extend_context(model.config, settings)
    if model.config.rope_parameters == before:
        return
    scale = next((n.attrs["scale"] for n in plan_graph(model.config, ())[0].nodes if n.op == "mla_attention"), None)
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child is not None and "inv_freq" in child._non_persistent_buffers_set:
                with torch.device(child.inv_freq.device):
                    parent._modules[name] = type(child)(config=model.config)
        if scale is not None and hasattr(parent, "kv_b_proj"):
            parent.scaling = scale


def room_of(config: Any) -> int | None:
    """Context length of a Transformers model in tokens, from its config; None if that does not contain it."""
    trained: int | None = getattr(config, "max_position_embeddings", None)
    rope = getattr(config, "rope_parameters", None) or {}
    dynamic = trained is not None and rope.get("rope_type") == "dynamic"
    return round(trained * rope["factor"]) if trained is not None and dynamic else trained


def extension_note(settings: DeepSeekConfig, config: Any) -> str | None:
    """The warning for a model with an extended context; None without an extension."""
    if settings.context_extension is None:
        return None
    trained = config.rope_parameters.get("original_max_position_embeddings", config.max_position_embeddings)
    return (
        f"context_extension={settings.context_extension!r}: quality beyond the {trained} tokens the model was trained for is "
        "not assured; measure it with dso bench --long"
    )


def _extended(config: Any, parameters: dict[str, Any], kind: str, length: int, trained: int) -> dict[str, Any]:
    parameters = {**parameters, "rope_type": kind, "factor": length / trained}
    if kind == "yarn":
        parameters["original_max_position_embeddings"] = trained
        if getattr(config, "kv_lora_rank", None) is not None:
            # Latent attention rotates only part of a head, so the scores are scaled instead of cos and sin, as in DeepSeek's
            # own configs.
            parameters |= {"mscale": 1.0, "mscale_all_dim": 1.0}
    return parameters


def _unscaled(parameters: dict[str, Any]) -> dict[str, Any]:
    added = ("factor", "original_max_position_embeddings", "mscale", "mscale_all_dim")
    return {name: value for name, value in parameters.items() if name not in added}
