"""Loads what answers chats: a model and its tokenizer, a model that drafts for it, and what encodes its pictures."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..errors import ConfigError, MissingPackageError
from ..integration.multimodal import PictureEncoder, is_multimodal
from ..optimized_model import load_model, load_tokenizer
from .named_template import use_template
from .pictures import load_processor

_SHARED = ("threads", "batch_size_range", "prefill_chunk", "device")  # fields that a draft model takes from the model's


def load(model: str, fields: dict[str, Any], template: str | None = None) -> tuple[Any, Any]:
    """The optimized model and its tokenizer.

    Args:
        model: path or name of the checkpoint.
        fields: of `DeepSeekConfig`, and `device` of `load_model`.
        template: Jinja source of a chat template that replaces the checkpoint's.

    Raises:
        DeepSeekOptimizerError: see `load_model` and `load_tokenizer`.
    """
    tokenizer = load_tokenizer(model)
    if template is not None:
        use_template(tokenizer, template)
    return load_model(model, **fields), tokenizer


def load_draft_model(model: str, draft_model: str | None, precision: str | None, fields: dict[str, Any]) -> Any:
    """The optimized model that drafts for another, for `make_engine(draft_model=...)`; None if neither is given.

    Args:
        model: path or name of the model that it drafts for, which drafts itself if only a precision is given.
        draft_model: path or name of the draft model.
        precision: weight format of the draft model.
        fields: of the model's `DeepSeekConfig`; the draft model uses as many threads and sequences, and the same device.
    """
    if draft_model is None and precision is None:
        return None
    shared: dict[str, Any] = {name: fields[name] for name in _SHARED if name in fields}
    if precision is not None:
        shared["precision"] = precision
    return load_model(draft_model or model, mtp="off", vision="off", **shared)


def picture_encoder(loaded: Any, model: str, warn: Callable[[str], None] | None) -> Any:
    """What makes prompts with pictures for a loaded model; None: it reads text only.

    Args:
        loaded: the model.
        model: its path or name.
        warn: called with a message if a library or a file is missing. None: raise an error instead, and also if the model
            reads text only.

    Raises:
        ConfigError, MissingPackageError: see `warn`.
    """
    if not is_multimodal(loaded):
        if warn is None:
            raise ConfigError(f"{model}: this model reads text only")
        return None
    try:
        return PictureEncoder(loaded, load_processor(model))
    except (ConfigError, MissingPackageError) as error:
        if warn is None:
            raise
        warn(f"{error}; the model reads text only")
        return None
