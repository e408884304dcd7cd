"""The formats of weights that are searched, and copies of a model in them, each packed once."""

from __future__ import annotations

import errno
import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..backends.qualities import EXACT, QUALITIES, Quality
from ..errors import ConfigError
from ..system.user_cache import user_cache

PRECISIONS = ("int8", "q4_1", "int4")  # of a model that is given in floats, those with the smallest loss first
_NESTED = "int8_nested"


@dataclass(frozen=True)
class WeightFormats:
    """What is searched.

    Attributes:
        precisions: as in `DeepSeekConfig`; "auto", the first: the model as it is given.
        qualities: as in `EngineOptions`, "exact" first.
        note: why only one format is searched; "": there are several.
    """

    precisions: tuple[str, ...] = ("auto",)
    qualities: tuple[Quality, ...] = (EXACT,)
    note: str = ""


def weight_formats(path: Path, fields: Mapping[str, Any]) -> WeightFormats:
    """The formats that a model can be served in: those of a model in floats, or the qualities of one in int8_nested.

    Args:
        path: of the model, see `resolve`.
        fields: of `DeepSeekConfig`, that are not searched.

    Raises:
        CheckpointError: the model cannot be read.
    """
    from ..checkpoint import PackedCheckpoint, SafetensorsCheckpoint, open_checkpoint
    from ..checkpoint.quantized import QuantizedCheckpoint

    qualities = tuple(reversed(QUALITIES))
    if (given := fields.get("precision", "auto")) != "auto":
        if given == _NESTED:
            return WeightFormats(qualities=qualities)
        return WeightFormats(note=f"formats of weights are not searched, since the precision is given: {given}")
    with open_checkpoint(path) as checkpoint:
        if isinstance(checkpoint, PackedCheckpoint):
            formats = sorted(set(checkpoint.manifest.formats().values()))
            if _NESTED in formats:
                return WeightFormats(qualities=qualities)
            kind = f"is packed in {', '.join(formats)}"
        elif isinstance(checkpoint, SafetensorsCheckpoint) and not isinstance(checkpoint, QuantizedCheckpoint):
            return WeightFormats(("auto", *PRECISIONS))
        else:
            kind = "is quantized already"
    return WeightFormats(note=f"formats of weights are not searched, since {path.name} {kind}; give the original model")


class PackedCopies:
    """Copies of a model, each packed when it is first needed, so that no trial packs the weights again. A context manager: they
    are in the user's cache directory until it ends.

    Args:
        path: of the model.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._folder, self._opened = path, Path(), ExitStack()

    def __enter__(self) -> PackedCopies:
        user_cache().mkdir(parents=True, exist_ok=True)
        made = tempfile.TemporaryDirectory(prefix="tune-", dir=user_cache())
        self._folder = Path(self._opened.enter_context(made))
        return self

    def __exit__(self, *_: object) -> None:
        self._opened.close()

    def __call__(self, precision: str) -> Path:
        """Where the model lies in a precision. Weights are rounded to the nearest, as `load_model` does.

        Raises:
            ConfigError: it cannot have this precision, or the disk is full.
            CheckpointError: see `pack_checkpoint`.
        """
        from ..checkpoint import load_tokenizer, open_checkpoint
        from ..integration.load.pack_checkpoint import pack_checkpoint

        copy = self._folder / precision
        if not copy.exists():
            with open_checkpoint(self._path) as checkpoint:
                tokenizer = load_tokenizer(checkpoint)
            try:
                pack_checkpoint(self._path, copy, {"precision": precision, "calibration": None}, tokenizer=tokenizer)
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise
                raise ConfigError(f"there is no room for a copy in {precision}: {error}") from error
        return copy
