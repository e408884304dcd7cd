"""Loads the model that is measured with texts."""

from __future__ import annotations

import os
from typing import Any


def load_text_model(path: str | os.PathLike[str], **fields: Any) -> Any:
    """`load_model`, but of a multimodal checkpoint the language model: its report and its config are those of a language model,
    as Transformers' side has them. If it cannot be loaded alone, the whole is loaded and the rest dropped."""
    from ..integration.load.loader import load
    from ..integration.multimodal import language_model_of

    return language_model_of(load(path, None, fields, language_alone="it is measured with texts"))
