"""`save_pretrained` of an optimised model: a packed checkpoint, each file whole or not there."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from ..checkpoint.atomic import merged_directory
from ..checkpoint.packed import write_safetensors
from ..checkpoint.shards import is_weights
from .graphs import whole_graph
from .instance_method import InstanceMethod
from .swap import weights_of


class PackedSave(InstanceMethod):
    """`model.save_pretrained`, on the instance.

    The directory changes at once when all is written; other files in it (a tokenizer, perhaps) stay. See `merged_directory` for
    where that cannot be had. Adapters, uploads and state dicts given by the caller go to Transformers' own.
    """

    def __call__(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:
        model = self.runtime.model
        plain = not getattr(model, "_hf_peft_config_loaded", False) and self.runtime.changed() is None
        if not plain or any(value not in (None, True, False) for value in kwargs.values()) or kwargs.get("push_to_hub"):
            type(model).save_pretrained(model, save_directory, **kwargs)
            return
        with merged_directory(save_directory, replaces=is_weights) as folder:
            self._write(folder)

    def _write(self, folder: Path) -> None:
        model = self.runtime.model
        save_configs(model, model.dtype, folder)
        write_safetensors(folder / "model.safetensors", weights_of(model, whole_graph(model)))


def save_configs(model: Any, dtype: torch.dtype, folder: Path) -> None:
    """config.json and generation_config.json. `dtype`: that of what is not packed."""
    model.config.dtype = str(dtype).removeprefix("torch.")
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
