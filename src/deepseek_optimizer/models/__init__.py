"""Model families: one file per `model_type`, named after it (with _ for -), with a function `build(fields) -> Graph`.

A family's file reads only the config, neither weights nor modules. To add a family, write `models/<model_type>.py` and its
entry in `families.py`. Families with layers for multi-token prediction also have `build_mtp(fields, depth, layers) -> Graph`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from importlib import import_module
from types import ModuleType
from typing import Any

from ..errors import ConfigError, UnsupportedModelError, shown
from ..graph.ir import Graph
from .decoder import MAX_VOCAB
from .families import ENCODERS, FAMILIES, MULTIMODAL, PARTS, SUPPORTED, TOWERS, Family, Multimodal, traits
from .fields import Fields
from .mtp import with_draft_vocabulary
from .vision import Tower

DTYPES = ("float32", "bfloat16", "float16", "float64", "float8_e4m3fn", "float8_e5m2")
MAX_LABELS, MAX_MTP_LAYERS = 1 << 16, 64


def build_graph(config: Any, mtp_layers: int = 0) -> Graph:
    """The unfused graph of a model.

    Args:
        config: a Transformers config object (`model.config`).
        mtp_layers: number of loaded MTP layers, which the cache has room for too.

    Raises:
        UnsupportedModelError: the family, or a feature that the config requires, is not supported.
        ConfigError: a field is not valid; the message names it.
    """
    fields = Fields(config)
    graph = _build(fields, _model_type(config))
    _check_dtype(fields, "dtype")
    _check_mtp(config, mtp_layers)
    return graph if not mtp_layers else replace(graph, cache=build_mtp_graph(config, 0, mtp_layers).cache)


def build_encoder_graph(config: Any) -> Graph:
    """The unfused graph of an encoder: from embeddings to the last hidden state. Weights are named as in the base model.

    Args:
        config: a Transformers config object.

    Raises:
        UnsupportedModelError: the family is not in `ENCODERS`, or a feature that the config requires is not supported.
        ConfigError: a field is not valid; the message names it.
    """
    model_type = _model_type(config)
    if model_type not in ENCODERS:
        raise UnsupportedModelError(f"config.model_type {model_type!r} is not an encoder. Supported: {', '.join(ENCODERS)}.")
    fields = Fields(config)
    _check_dtype(fields, "dtype")
    graph: Graph = import_module(f"{__name__}.{model_type.replace('-', '_')}").build(fields)
    return graph


def build_tower(config: Any) -> Tower:
    """The layers of a vision tower, with an unfused graph. Weights are named as in the module whose layers these are.

    Args:
        config: a multimodal model's `vision_config`.

    Raises:
        UnsupportedModelError: the tower is not in `TOWERS`, or a feature that the config requires is not supported.
        ConfigError: a field is not valid; the message names it.
    """
    model_type = _model_type(config)
    if model_type not in TOWERS:
        raise UnsupportedModelError(f"config.model_type {model_type!r} is no vision tower with a plan: {', '.join(TOWERS)}.")
    tower: Tower = import_module(f"{__name__}.{model_type}").build(Fields(config))
    return tower


def has_mtp(model_type: str) -> bool:
    """Whether models of a supported family may have layers for multi-token prediction."""
    return hasattr(_family(model_type), "build_mtp")


def mtp_layers(config: Any) -> int:
    """The number of layers for multi-token prediction that the config announces; 0 in families without them.

    Args:
        config: a Transformers config object, or the content of a config.json.
    """
    fields = Fields(config)
    if not has_mtp(_model_type(config)) or fields.get("num_nextn_predict_layers") is None:
        return 0
    return fields.integer("num_nextn_predict_layers", MAX_MTP_LAYERS, low=0)


def draft_vocab_size(config: Any) -> int | None:
    """The number of tokens that the heads of a config's MTP layers have rows for; None: all tokens.

    Args:
        config: a Transformers config object, or the content of a config.json.
    """
    fields = Fields(config)
    if fields.get("draft_vocab_size") is None or not mtp_layers(config):
        return None
    return fields.integer("draft_vocab_size", fields.integer("vocab_size", MAX_VOCAB))


def build_mtp_graph(config: Any, depth: int, layers: int | None = None) -> Graph:
    """The unfused graph of one MTP layer. A step takes hidden states (`states`) and the tokens that follow each of them.

    Weights are named as in checkpoints: `model.layers.{num_hidden_layers + depth}.*`.

    Args:
        config: a Transformers config object.
        depth: index of the layer, from 0.
        layers: number of loaded MTP layers; None: all. The model's graph must be built for the same number, since they share a
            cache.

    Raises:
        ConfigError: the config announces no such layer.
    """
    count = mtp_layers(config) if layers is None else layers
    _check_mtp(config, count)
    if not 0 <= depth < count:
        raise ConfigError(f"config.num_nextn_predict_layers: there is no MTP layer {depth} among {count}")
    graph: Graph = _family(_model_type(config)).build_mtp(Fields(config), depth, count)
    size = draft_vocab_size(config)
    return graph if size is None else with_draft_vocabulary(graph, size)


def check_config(raw: Mapping[str, Any]) -> None:
    """Checks the content of a `config.json` that is completed with defaults.

    Raises:
        UnsupportedModelError, ConfigError: as in `build_graph`.
    """
    if not isinstance(raw, Mapping):
        raise ConfigError(f"config: expected an object with fields, got {type(raw).__name__}")
    fields = Fields(raw)
    if (model_type := raw.get("model_type")) in PARTS:
        raise UnsupportedModelError(f"config.model_type {model_type!r} is part of a multimodal model; load the whole model.")
    _build(fields, model_type)
    mtp_layers(raw)
    draft_vocab_size(raw)
    for name in ("dtype", "torch_dtype"):
        _check_dtype(fields, name)
    if "num_labels" in raw:  # not used here, but Transformers creates a table of that length
        fields.integer("num_labels", MAX_LABELS)


def _model_type(config: Any) -> Any:
    return config.get("model_type") if isinstance(config, Mapping) else getattr(config, "model_type", None)


def _family(model_type: Any) -> ModuleType:
    if model_type not in SUPPORTED and model_type not in PARTS:
        raise UnsupportedModelError(f"config.model_type {model_type!r} is not supported. Supported: {', '.join(SUPPORTED)}.")
    return import_module(f"{__name__}.{model_type}")


def _build(fields: Fields, model_type: Any) -> Graph:
    graph: Graph = _family(model_type).build(fields)
    return graph


def _check_dtype(fields: Fields, name: str) -> None:
    """Raises ConfigError unless the field is a dtype: Transformers would accept any number or name of an attribute of torch."""
    value = fields.get(name)
    text = str(value).removeprefix("torch.") if type(value).__name__ == "dtype" else value  # config objects have a torch.dtype
    if value is not None and (not isinstance(text, str) or text not in DTYPES):
        raise ConfigError(f"config.{name}: expected one of {', '.join(DTYPES)}, got {shown(value)}")


def _check_mtp(config: Any, count: int) -> None:
    available = mtp_layers(config)
    if not 0 <= count <= available:
        raise ConfigError(f"config.num_nextn_predict_layers: {count} MTP layers requested, but the config has {available}")


__all__ = [
    "DTYPES",
    "ENCODERS",
    "FAMILIES",
    "MAX_LABELS",
    "MAX_MTP_LAYERS",
    "MULTIMODAL",
    "PARTS",
    "SUPPORTED",
    "TOWERS",
    "Family",
    "Multimodal",
    "Tower",
    "build_encoder_graph",
    "build_graph",
    "build_mtp_graph",
    "build_tower",
    "check_config",
    "draft_vocab_size",
    "has_mtp",
    "mtp_layers",
    "traits",
]
