"""`save_pretrained` of an optimized model: writes a packed checkpoint atomically."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ...checkpoint.atomic import merged_directory
from ...checkpoint.manifest import KEY, Manifest
from ...checkpoint.packed import write_safetensors
from ...checkpoint.shards import is_weights
from ..bind.dtypes import model_dtype
from ..bind.instance_method import InstanceMethod
from ..bind.swap import stored_tensors


class PackedSave(InstanceMethod):
    """`model.save_pretrained`.

    The directory changes in one step when everything is written; its other files (such as a tokenizer) stay. For the exceptions
    see `merged_directory`. With adapters, uploads or a state dict from the caller, Transformers' own method runs.
    """

    def __call__(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:
        model = self.runtime.model
        plain = not getattr(model, "_hf_peft_config_loaded", False) and self.runtime.changed() is None
        if not plain or any(value not in (None, True, False) for value in kwargs.values()) or kwargs.get("push_to_hub"):
            with self._intact():
                type(model).save_pretrained(model, save_directory, **kwargs)
            return
        with merged_directory(save_directory, replaces=is_weights) as folder:
            self._write(folder)

    def _write(self, folder: Path) -> None:
        model = self.runtime.model
        tensors = stored_tensors(model)
        manifest = Manifest.of(tensors, self.runtime.manifest.curve, self.runtime.manifest.rounding)
        save_configs(model, model_dtype(model), folder, manifest)
        with self._intact():
            write_safetensors(folder / "model.safetensors", tensors)

    @contextmanager
    def _intact(self) -> Iterator[None]:
        """For code that reads the weights: raises CheckpointChangedError if a file that they are mapped from was modified."""
        self.runtime.check_weights()
        try:
            yield
        except OSError:  # EFAULT: a system call read beyond the end of a truncated file
            self.runtime.check_weights()
            raise
        self.runtime.check_weights()


def save_configs(model: Any, dtype: torch.dtype, folder: Path, manifest: Manifest) -> None:
    """Writes config.json, and generation_config.json for models that generate.

    Args:
        model: the model.
        dtype: that it was loaded in.
        folder: the directory to write to.
        manifest: the manifest of the saved tensors.
    """
    model.config.dtype = str(dtype).removeprefix("torch.")
    model.config.architectures = [type(model).__name__]
    config = copy.copy(model.config)  # a decoder and the model around it share a config, but name weights differently
    setattr(config, KEY, manifest.to_dict())
    config.save_pretrained(folder)
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.save_pretrained(folder)
