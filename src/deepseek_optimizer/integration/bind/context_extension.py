"""Room for more tokens than a model was trained for, by its RoPE: YaRN (Peng et al. 2023) or dynamic NTK scaling.

A Transformers config says it all: `rope_parameters`, and with YaRN `max_position_embeddings` too. (The dynamic kind's formula
takes the trained length from there, so it stays; the room is `factor` times as much.) So the config is changed before a model
is made from it, graph and Transformers' own modules follow, and what is saved opens in the same way.
"""

from __future__ import annotations

import copy
from typing import Any

import torch

from ...config import DeepSeekConfig
from ...errors import ConfigError
from .graphs import plan_graph


def extend_context(config: Any, settings: DeepSeekConfig) -> None:
    """Changes a Transformers config as `settings.context_extension` asks; once more changes nothing.

    Raises:
        ConfigError: there is no length, or none above the trained one; or the config scales its RoPE already.
    """
    if settings.context_extension is None:
        return
    kind, length = settings.context_extension, settings.context_length
    given = dict(config.rope_parameters)
    if length is None:
        raise ConfigError(f"context_extension={kind!r} needs context_length, the tokens to make room for")
    if given.get("rope_type", "default") != "default":
        original = given.get("original_max_position_embeddings") if kind == "yarn" else config.max_position_embeddings
        if original and given == _extended(config, _unscaled(given), kind, length, original):
            return
        raise ConfigError(
            f"context_extension={kind!r}: the model's config scales its RoPE already (rope_type {given['rope_type']!r}, "
            f"max_position_embeddings {config.max_position_embeddings}), and can be scaled only once; leave it out"
        )
    trained = config.max_position_embeddings
    if length <= trained:
        raise ConfigError(
            f"context_length={length}: the model was trained for {trained} tokens, which it has room for anyway; ask for more, "
            f"or leave context_extension={kind!r} out"
        )
    config.rope_parameters = _extended(config, given, kind, length, trained)
    if kind == "yarn":
        config.max_position_embeddings = length


def extended(config: Any, settings: DeepSeekConfig) -> Any:
    """A changed copy of a config, or itself where nothing is asked; it raises as `extend_context` and `plan_graph` do."""
    if settings.context_extension is None:
        return config
    twin = copy.deepcopy(config)
    extend_context(twin, settings)
    plan_graph(twin, ())
    return twin


def extend_model(model: Any, settings: DeepSeekConfig) -> None:
    """The same for a model that is there already: what it made of its config is made anew.

    Raises: as `extend_context`, with nothing changed.
    """
    before = dict(model.config.rope_parameters)
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
    """Tokens that a text of a Transformers model may have, by its config; None where that does not say."""
    trained: int | None = getattr(config, "max_position_embeddings", None)
    rope = getattr(config, "rope_parameters", None) or {}
    dynamic = trained is not None and rope.get("rope_type") == "dynamic"
    return round(trained * rope["factor"]) if trained is not None and dynamic else trained


def extension_note(settings: DeepSeekConfig, config: Any) -> str | None:
    """What whoever loads such a model should know; None where nothing was extended."""
    if settings.context_extension is None:
        return None
    trained = config.rope_parameters.get("original_max_position_embeddings", config.max_position_embeddings)
    return (
        f"context_extension={settings.context_extension!r}: positions beyond what it was trained for ({trained}): quality is "
        "not assured; measure with dso bench --long"
    )


def _extended(config: Any, parameters: dict[str, Any], kind: str, length: int, trained: int) -> dict[str, Any]:
    parameters = {**parameters, "rope_type": kind, "factor": length / trained}
    if kind == "yarn":
        parameters["original_max_position_embeddings"] = trained
        if getattr(config, "kv_lora_rank", None) is not None:
            # Latent attention turns but a part of a head: so the scores are scaled instead of cos and sin, as DeepSeek's own
            # configs have it.
            parameters |= {"mscale": 1.0, "mscale_all_dim": 1.0}
    return parameters


def _unscaled(parameters: dict[str, Any]) -> dict[str, Any]:
    made = ("factor", "original_max_position_embeddings", "mscale", "mscale_all_dim")
    return {name: value for name, value in parameters.items() if name not in made}
