"""Model families: one file a `model_type`, each with `build(fields) -> Graph`, found by name.

A family's file reads a config only: no weights, no modules. To add one, write `models/<model_type>.py` and its entry in
`families.py`. One with layers for multi-token prediction also has `build_mtp(fields, depth, layers) -> Graph`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from importlib import import_module
from types import ModuleType
from typing import Any

from ..errors import ConfigError, UnsupportedModelError, shown
from ..graph.ir import Graph
from .families import FAMILIES, SUPPORTED, Family, traits
from .fields import Fields

DTYPES = ("float32", "bfloat16", "float16", "float64", "float8_e4m3fn", "float8_e5m2")
MAX_LABELS, MAX_MTP_LAYERS = 1 << 16, 64


def build_graph(config: Any, mtp_layers: int = 0) -> Graph:
    """The unfused graph of a model.

    Args:
        config: a Transformers config object (`model.config`).
        mtp_layers: how many MTP layers are loaded beside the model; the cache has room for them too.

    Raises:
        UnsupportedModelError: the family, or a feature the config asks for, is not known here.
        ConfigError: a field is wrong; the message names it.
    """
    fields = Fields(config)
    graph = _build(fields, _model_type(config))
    _check_dtype(fields, "dtype")
    _check_mtp(config, mtp_layers)
    return replace(graph, cache=replace(graph.cache, layers=graph.cache.layers + mtp_layers))


def mtp_layers(config: Any) -> int:
    """How many layers for multi-token prediction the config promises beside the model's own; 0 in families without.

    Args:
        config: a Transformers config object, or the content of a config.json.
    """
    family = _family(_model_type(config))
    fields = Fields(config)
    if not hasattr(family, "build_mtp") or fields.get("num_nextn_predict_layers") is None:
        return 0
    return fields.integer("num_nextn_predict_layers", MAX_MTP_LAYERS, low=0)


def build_mtp_graph(config: Any, depth: int, layers: int | None = None) -> Graph:
    """The unfused graph of one MTP layer. A step of it needs `states`: hidden states, and as tokens those that follow them.

    Weights are named as checkpoints have them: `model.layers.{num_hidden_layers + depth}.*`.

    Args:
        depth: which layer, from 0.
        layers: how many are loaded, None for all: the graph of the model must be built for as many, since they share a cache.

    Raises:
        ConfigError: the config promises no such layer.
    """
    count = mtp_layers(config) if layers is None else layers
    _check_mtp(config, count)
    if not 0 <= depth < count:
        raise ConfigError(f"config.num_nextn_predict_layers: there is no MTP layer {depth} of {count}")
    graph: Graph = _family(_model_type(config)).build_mtp(Fields(config), depth, count)
    return graph


def check_config(raw: Mapping[str, Any]) -> None:
    """Checks the content of a `config.json`, with its defaults in.

    Raises: as `build_graph`.
    """
    if not isinstance(raw, Mapping):
        raise ConfigError(f"config: expected an object with fields, got {type(raw).__name__}")
    fields = Fields(raw)
    _build(fields, raw.get("model_type"))
    mtp_layers(raw)
    for name in ("dtype", "torch_dtype"):
        _check_dtype(fields, name)
    if "num_labels" in raw:  # nothing here uses it, but Transformers makes a table of that length
        fields.integer("num_labels", MAX_LABELS)


def _model_type(config: Any) -> Any:
    return config.get("model_type") if isinstance(config, Mapping) else getattr(config, "model_type", None)


def _family(model_type: Any) -> ModuleType:
    if model_type not in SUPPORTED:
        raise UnsupportedModelError(f"config.model_type {model_type!r} is not supported. Supported: {', '.join(SUPPORTED)}.")
    return import_module(f"{__name__}.{model_type}")


def _build(fields: Fields, model_type: Any) -> Graph:
    graph: Graph = _family(model_type).build(fields)
    return graph


def _check_dtype(fields: Fields, name: str) -> None:
    """Transformers takes any number for a dtype, and any attribute of torch by its name."""
    value = fields.get(name)
    written = str(value).removeprefix("torch.") if type(value).__name__ == "dtype" else value  # a config object has torch's own
    if value is not None and (not isinstance(written, str) or written not in DTYPES):
        raise ConfigError(f"config.{name}: expected one of {', '.join(DTYPES)}, got {shown(value)}")


def _check_mtp(config: Any, count: int) -> None:
    promised = mtp_layers(config)
    if not 0 <= count <= promised:
        raise ConfigError(f"config.num_nextn_predict_layers: {count} MTP layers are asked for, the config promises {promised}")


__all__ = [
    "DTYPES",
    "FAMILIES",
    "MAX_LABELS",
    "MAX_MTP_LAYERS",
    "SUPPORTED",
    "Family",
    "build_graph",
    "build_mtp_graph",
    "check_config",
    "mtp_layers",
    "traits",
]
