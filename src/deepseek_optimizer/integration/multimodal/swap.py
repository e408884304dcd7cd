"""Packs a multimodal model: the language model's matrices as for its plan, and the linear layers of everything else.

A vision tower keeps its precision unless `formats` names its layers: it is a small part of the weights, and all tokens that see
a picture depend on it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from ...config import DeepSeekConfig
from ...errors import ConfigError
from ...quant import Packer
from .. import general
from ..bind import swap
from .parts import decoder_path, language_graph


def swap_on_meta(model: Any, config: DeepSeekConfig, dtype: torch.dtype, packed: Mapping[str, str] | None = None) -> None:
    """Replaces modules by empty packed ones before weights are loaded. Arguments and errors as in `general.swap_on_meta`."""
    language, rest = _divided(model, config)
    with torch.device("cpu"):
        graph = language_graph(model)
    swap.swap_on_meta(model, graph, language, dtype, packed=packed)
    general.swap_on_meta(model, rest, dtype, packed, without=decoder_path(model))


def pack_in_place(model: Any, config: DeepSeekConfig, packer: Packer) -> None:
    """Packs a loaded model. Arguments and errors as in `general.pack_in_place`."""
    language, rest = _divided(model, config)
    swap.pack_in_place(model, language_graph(model), language, packer)
    general.pack_in_place(model, rest, packer, without=decoder_path(model))


def _divided(model: Any, config: DeepSeekConfig) -> tuple[DeepSeekConfig, DeepSeekConfig]:
    """The settings for the language model and for the rest, with their own entries of `formats`. An entry that names neither
    goes to the rest, where it is an error.

    Raises:
        ConfigError: an entry has the name that a weight has in the language model alone.
    """
    formats = config.formats or {}
    with torch.device("cpu"):
        names = [weight.removesuffix(".weight") for weight in language_graph(model).weights()]
    foreign = set(config.unmatched(names))
    inner, path = "model.", f"{decoder_path(model)}."
    for entry in foreign:
        own = f"{path}{entry.removeprefix(inner)}"
        if entry.startswith(inner) and not DeepSeekConfig(formats={own: formats[entry]}).unmatched(names):
            raise ConfigError(
                f"formats names {entry!r}, but the language model's weights begin with {path!r} in this model; write {own!r}"
            )
    language = {entry: name for entry, name in formats.items() if entry not in foreign}
    rest = {entry: name for entry, name in formats.items() if entry in foreign}
    return (
        replace(config, formats=language or None),
        replace(config, formats=rest or None, precision="fp32" if config.precision == "fp32" else "auto"),
    )
