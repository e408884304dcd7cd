"""The models that a server may load: files and directories, by name. Clients' names are never used as paths."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import ConfigError

_SPLIT = re.compile(r"(?P<name>.+)-(?P<part>\d{5})-of-\d{5}")
_MAX_CONFIG = 1 << 24  # bytes of a config.json
_WEIGHTS = (".safetensors", ".gguf")


@dataclass(frozen=True)
class ModelFile:
    """A checkpoint.

    Attributes:
        name: its name in the API.
        path: a directory or .gguf file, or a model name on the Hugging Face Hub.
        bytes: size of its weights in files; 0: unknown.
        context: context length in tokens by its config.json; None: unknown until it is loaded.
    """

    name: str
    path: str
    bytes: int = 0
    context: int | None = None


def models_of(directory: str | os.PathLike[str]) -> dict[str, ModelFile]:
    """The models in a directory by name: each subdirectory with a config.json or a .gguf file, and each .gguf file.

    Raises:
        ConfigError: the directory cannot be read.
    """
    try:
        paths = sorted(Path(directory).iterdir())
    except OSError as error:
        raise ConfigError(f"--models-dir: {directory} cannot be read: {error.strerror}") from None
    found: dict[str, ModelFile] = {}
    for path in paths:
        if path.name.startswith("."):
            continue
        model = _directory(path) if path.is_dir() else _gguf(path)
        if model is not None:
            found.setdefault(model.name, model)
    return found


def models_at(paths: Iterable[str]) -> dict[str, ModelFile]:
    """Models given by path or by name on the hub; their names in the API are the last components.

    Raises:
        ConfigError: two of them have the same name.
    """
    found: dict[str, ModelFile] = {}
    for text in paths:
        path = Path(text)
        model = _directory(path) if path.is_dir() else _gguf(path)
        model = model or ModelFile(os.path.basename(os.path.normpath(text)), text)
        if model.name in found:
            raise ConfigError(f"two models have the name {model.name}: {found[model.name].path} and {text}; rename one")
        found[model.name] = model
    return found


def _directory(path: Path) -> ModelFile | None:
    """The model in a directory; None: there is none."""
    name = os.path.basename(os.path.abspath(path))
    if (path / "config.json").is_file():
        return ModelFile(name, str(path), _size(path), _context(path / "config.json"))
    inside = [model for file in sorted(path.glob("*.gguf")) if (model := _gguf(file)) is not None]
    return ModelFile(name, inside[0].path, inside[0].bytes) if len(inside) == 1 else None


def _gguf(path: Path) -> ModelFile | None:
    """The model in a .gguf file; None: it is none, or a later part of a model in several files."""
    if path.suffix != ".gguf" or path.name.startswith("mmproj") or not path.is_file():
        return None
    split = _SPLIT.fullmatch(path.stem)
    if split is None:
        return ModelFile(path.stem, str(path), path.stat().st_size)
    if int(split["part"]) != 1:
        return None
    parts = path.parent.glob(f"{split['name']}-?????-of-?????.gguf")
    return ModelFile(split["name"], str(path), sum(part.stat().st_size for part in parts))


def _size(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.iterdir() if path.suffix in _WEIGHTS and path.is_file())


def _context(config: Path) -> int | None:
    try:
        if config.stat().st_size > _MAX_CONFIG:
            return None
        fields: Any = json.loads(config.read_text(encoding="utf-8"))
        length = fields.get("max_position_embeddings") or (fields.get("text_config") or {}).get("max_position_embeddings")
    except (OSError, ValueError, AttributeError, RecursionError):
        return None
    return length if isinstance(length, int) else None
