"""Model families: one file a `model_type`, each with `build(fields) -> Graph`, found by name.

A family reads a config only: no weights, no modules. To add one, write `models/<model_type>.py` and name it in `FAMILIES`.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any

from ..errors import ConfigError, UnsupportedModelError
from ..graph.ir import Graph
from .fields import Fields

FAMILIES = ("llama", "qwen2", "qwen3")
MAX_LABELS = 1 << 16


def build_graph(config: Any) -> Graph:
    """The unfused graph of a model.

    Args:
        config: a Transformers config object (`model.config`).

    Raises:
        UnsupportedModelError: the family, or a feature the config asks for, is not known here.
        ConfigError: a field is wrong; the message names it.
    """
    return _build(Fields(config), getattr(config, "model_type", None))


def check_config(raw: Mapping[str, Any]) -> None:
    """Checks the content of a `config.json` before Transformers makes an object, or memory is taken, from it.

    Raises: as `build_graph`.
    """
    if not isinstance(raw, Mapping):
        raise ConfigError(f"config: expected an object with fields, got {type(raw).__name__}")
    from transformers import CONFIG_MAPPING  # heavy, and needed for the defaults of fields left out

    model_type: Any = raw.get("model_type")
    fields = Fields(raw, CONFIG_MAPPING[model_type] if model_type in FAMILIES else None)
    _build(fields, model_type)
    if "num_labels" in raw:  # nothing here uses it, but Transformers makes a table of that length
        fields.integer("num_labels", MAX_LABELS)


def _build(fields: Fields, model_type: Any) -> Graph:
    if model_type not in FAMILIES:
        raise UnsupportedModelError(
            f"config.model_type {model_type!r} is not a family this version can optimise. Known: {', '.join(FAMILIES)}."
        )
    graph: Graph = import_module(f"{__name__}.{model_type}").build(fields)
    return graph
