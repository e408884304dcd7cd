"""Locates a checkpoint: a local path, or a model on the Hugging Face Hub, which is downloaded."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from ...errors import CheckpointError

_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
_HUB_FILES = ["*.safetensors", "*.safetensors.index.json", "*.json", "*.jinja", "*.txt", "tokenizer.model"]


def resolve(path: str | os.PathLike[str], **hub: Any) -> Path:
    """The local path of a checkpoint; a model on the hub is downloaded (safetensors, never pickles) unless it is cached.

    Args:
        path: a local file or directory, or the name of a model on the hub.
        hub: further arguments of `huggingface_hub.snapshot_download`: revision, token, local_files_only, cache_dir.

    Raises:
        CheckpointError: the file does not exist; or the hub has no such model or cannot be reached.
    """
    text = os.fspath(path)
    if os.path.exists(text):
        return Path(text)
    if text.endswith((".gguf", ".safetensors")) or not _HUB_NAME.fullmatch(text) or text.startswith("."):
        raise CheckpointError("does not exist", file=text)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(text, allow_patterns=_HUB_FILES, **hub))
    except Exception as error:  # the hub's client raises many types
        raise CheckpointError(
            f"is neither a local path nor a model that the hub provides ({type(error).__name__}: {error})", file=text
        ) from error
