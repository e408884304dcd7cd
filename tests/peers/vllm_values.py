"""Values in vLLM's tests that belong to the model that they name: the token ids of a text and the size of a vector."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any


def set_values(module: ModuleType, directory_of: Callable[[str], Path]) -> None:
    """Replaces the values of a test module by those of the model that takes the place of its `MODEL_NAME`.

    Args:
        module: the test module.
        directory_of: returns the directory of the model that takes the place of one.
    """
    name = getattr(module, "MODEL_NAME", None)
    if name is None:
        return
    directory = directory_of(name)
    if hasattr(module, "input_tokens") and hasattr(module, "input_text"):
        from transformers import PreTrainedTokenizerFast

        module.input_tokens = PreTrainedTokenizerFast.from_pretrained(directory)(module.input_text)["input_ids"]
    if hasattr(module, "EMBEDDING_SIZE"):
        module.EMBEDDING_SIZE = _config(directory)["hidden_size"]


class ModelConfig:
    """In place of vLLM's class of this name, for the size of the vocabulary.

    Args:
        directory: of the model.
    """

    def __init__(self, directory: Path) -> None:
        self._fields = _config(directory)

    def get_vocab_size(self) -> int:
        return int(self._fields["vocab_size"])


def _config(directory: Path) -> dict[str, Any]:
    fields: dict[str, Any] = json.loads((directory / "config.json").read_text())
    return fields
