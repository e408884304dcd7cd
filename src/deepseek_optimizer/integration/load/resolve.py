"""Where a checkpoint is: a local path, or a model of the hub, which is fetched."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from ...errors import CheckpointError

_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
_HUB_FILES = ["*.safetensors", "*.safetensors.index.json", "*.json", "*.jinja", "*.txt", "tokenizer.model"]


def resolve(path: str | os.PathLike[str], **hub: Any) -> Path:
    """A local file or directory as it is; a hub name is fetched (safetensors, never pickles), or found in the hub's cache.

    Args:
        hub: what the hub's client takes beside the name: revision, token, local_files_only, cache_dir.

    Raises:
        CheckpointError: there is no such file, and the hub has no such model or cannot be reached.
    """
    text = os.fspath(path)
    if os.path.exists(text):
        return Path(text)
    if text.endswith((".gguf", ".safetensors")) or not _HUB_NAME.fullmatch(text) or text.startswith("."):
        raise CheckpointError("does not exist", file=text)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(text, allow_patterns=_HUB_FILES, **hub))
    except Exception as error:  # the hub's client raises a dozen kinds
        raise CheckpointError(
            f"is neither a local path nor a model the hub can give ({type(error).__name__}: {error})", file=text
        ) from error
