"""Configs whose layers differ in some fields, as Transformers describes them with `per_layer_config`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import ConfigError, UnsupportedModelError, shown
from .decoder import FULL
from .fields import Fields

_SIZES = ("head_dim", "num_key_value_heads")


def layer_fields(fields: Fields, kinds: Sequence[str]) -> list[Fields]:
    """For each layer the fields with its own `head_dim` and `num_key_value_heads`.

    Args:
        fields: of a config object; or of a config.json, which has `per_layer_config`, or Gemma 4's `global_head_dim` and
            `num_global_key_value_heads` for the full layers.
        kinds: each layer's type.

    Raises:
        UnsupportedModelError: layers differ in other fields.
        ConfigError: `per_layer_config` does not have the form {layer: {field: value}}.
    """
    config = fields.get("per_layer_config")
    if config is None:
        full: dict[str, Any] = {"head_dim": fields.get("global_head_dim", 512)}
        if fields.flag("attention_k_eq_v") and fields.get("num_global_key_value_heads") is not None:
            full["num_key_value_heads"] = fields.get("num_global_key_value_heads")
        return [fields.with_(**full) if kind == FULL else fields for kind in kinds]
    if not isinstance(config, Mapping):  # of a config object: a config per layer
        _check_names(fields.get("per_layer_attributes") or ())
        return [fields.with_(**{name: getattr(config[layer], name) for name in _SIZES}) for layer in range(len(kinds))]
    overrides: dict[int, Mapping[str, Any]] = {}
    for layer, values in config.items():
        if not str(layer).isdecimal() or int(layer) >= len(kinds) or not isinstance(values, Mapping):
            raise ConfigError(f"config.per_layer_config: expected fields by number of a layer, got {shown(config)}")
        _check_names(values)
        overrides[int(layer)] = values
    return [fields.with_(**overrides.get(layer, {})) for layer in range(len(kinds))]


def _check_names(names: Any) -> None:
    others = sorted(set(names) - set(_SIZES))
    if others:
        raise UnsupportedModelError(
            f"config.per_layer_config: layers differ in {', '.join(others)}; supported: {', '.join(_SIZES)}"
        )
