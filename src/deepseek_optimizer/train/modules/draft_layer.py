"""The layer that is trained to draft for a model, while the model itself is frozen (`dso draft`)."""

from __future__ import annotations

from typing import Any

import torch

from ...errors import ConfigError
from ...integration.bind.graphs import HEAD, loaded_mtp_layers
from ...integration.load.mtp_layers import add_mtp_layers
from ...models import FAMILIES, SUPPORTED, draft_vocab_size, has_mtp, mtp_layers
from .draft_vocabulary import frequent_tokens, set_draft_vocabulary, vocabulary_to_add
from .mtp import RANDOM, add_trained_layers


def add_draft_layer(model: Any, vocabulary: int | None = 0, rows: Any = None) -> tuple[list[str], bool]:
    """Freezes a model's weights, and adds the MTP layers of its checkpoint or, if it has none, a new one.

    The config then declares the layers, and `save_pretrained` saves them with the model.

    Args:
        model: the model.
        vocabulary: number of tokens of a draft vocabulary; 0: all; None: the default, see `DeepSeekTrainingArguments`.
        rows: the training data, whose most frequent tokens are the draft vocabulary.

    Returns: sentences about the source of the layers' weights, and whether all of them are new.

    Raises:
        ConfigError: the family has no such layers, the model has an adapter, the checkpoint's layers have a draft vocabulary of
            another size, or the data has no length.
    """
    _freeze(model)
    notes = add_trained_layers(model)
    for layer in model.model.layers[model.config.num_hidden_layers :]:
        layer.requires_grad_(True)
    new = all(note.endswith(RANDOM) for note in notes) and bool(notes)
    if (size := vocabulary_to_add(model, vocabulary, new)) is not None:
        if not hasattr(rows, "__len__"):
            raise ConfigError(
                f"draft_vocabulary={size} counts the tokens of the training data, which has no length; set "
                "draft_vocabulary=0, or pass a data set with a length"
            )
        set_draft_vocabulary(model, frequent_tokens(rows, size, model.config.vocab_size))
    return notes, new


def sketch_draft_layer(model: Any, vocabulary: int | None = 0) -> None:
    """Like `add_draft_layer`, for a model on the meta device: nothing is read.

    Raises:
        ConfigError: as there.
    """
    new = not mtp_layers(model.config)
    _freeze(model)
    if not loaded_mtp_layers(model):
        own = frozenset() if draft_vocab_size(model.config) is None else frozenset((HEAD,))
        add_mtp_layers(model, [own] * mtp_layers(model.config))
    if (size := vocabulary_to_add(model, vocabulary, new)) is not None:
        set_draft_vocabulary(model, torch.empty(size, dtype=torch.int64, device="meta"))


def _freeze(model: Any) -> None:
    family = str(getattr(model.config, "model_type", ""))
    if hasattr(model, "get_base_model"):
        raise ConfigError("draft_steps: the model has an adapter; train the layer for the model without it, or merge it first")
    able_to = [name for name in SUPPORTED if has_mtp(name) and FAMILIES[name].trains_drafts]
    if family not in able_to:
        able = ", ".join(able_to)
        raise ConfigError(f"draft_steps: a {family} model can have no layer that drafts; families that can: {able}")
    model.requires_grad_(False)
    if not mtp_layers(model.config):
        model.config.num_nextn_predict_layers = 1
