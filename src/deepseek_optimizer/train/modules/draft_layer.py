"""The layer that is trained to draft for a model, while the model itself is frozen (`dso draft`)."""

from __future__ import annotations

from typing import Any

from ...errors import ConfigError
from ...integration.bind.graphs import loaded_mtp_layers
from ...integration.load.mtp_layers import add_mtp_layers
from ...models import SUPPORTED, has_mtp, mtp_layers
from .mtp import RANDOM, add_trained_layers


def add_draft_layer(model: Any) -> tuple[list[str], bool]:
    """Freezes a model's weights, and adds the MTP layers of its checkpoint or, if it has none, a new one.

    The config then declares the layers, and `save_pretrained` saves them with the model.

    Returns: sentences about the source of the layers' weights, and whether all of them are new.

    Raises:
        ConfigError: the family has no such layers, or the model has an adapter.
    """
    _freeze(model)
    notes = add_trained_layers(model)
    for layer in model.model.layers[model.config.num_hidden_layers :]:
        layer.requires_grad_(True)
    return notes, all(note.endswith(RANDOM) for note in notes) and bool(notes)


def sketch_draft_layer(model: Any) -> None:
    """Like `add_draft_layer`, for a model on the meta device: nothing is read.

    Raises:
        ConfigError: as there.
    """
    _freeze(model)
    if not loaded_mtp_layers(model):
        add_mtp_layers(model, [frozenset()] * mtp_layers(model.config))


def _freeze(model: Any) -> None:
    family = str(getattr(model.config, "model_type", ""))
    if hasattr(model, "get_base_model"):
        raise ConfigError("draft_steps: the model has an adapter; train the layer for the model without it, or merge it first")
    if family not in SUPPORTED or not has_mtp(family):
        able = ", ".join(filter(has_mtp, SUPPORTED))
        raise ConfigError(f"draft_steps: a {family} model can have no layer that drafts; families that can: {able}")
    model.requires_grad_(False)
    if not mtp_layers(model.config):
        model.config.num_nextn_predict_layers = 1
