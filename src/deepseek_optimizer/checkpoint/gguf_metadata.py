"""A GGUF file's metadata, value by value, each of the type that is asked for."""

from __future__ import annotations

import math
from pathlib import Path

from ..errors import CheckpointError
from .gguf_header import GgufHeader


class Metadata:
    """Typed access to a header's values; errors name the key and the file."""

    def __init__(self, header: GgufHeader, path: Path) -> None:
        self.values, self.tensors, self.path = header.values, header.tensors, path
        self.architecture = self.text("general.architecture")

    def has(self, key: str) -> bool:
        """Whether a key of the model's own is there."""
        return self.of_model(key) in self.values

    def wrong(self, key: str, what: str) -> CheckpointError:
        return CheckpointError(f"{key} {what}", file=self.path)

    def text(self, key: str, default: str | None = None) -> str:
        value = self.values.get(key, default)
        if not isinstance(value, str):
            raise self.wrong(key, "is missing" if value is None else f"must be text, not {value!r}")
        return value

    def integer(self, key: str, default: int | None = None, least: int = 1) -> int:
        value = self.values.get(key, default)
        if type(value) is not int or not least <= value < 1 << 31:
            raise self.wrong(key, "is missing" if value is None else f"must be a whole number >= {least}, not {value!r}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self.values.get(key, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or value <= 0:
            raise self.wrong(key, "is missing" if value is None else f"must be a positive number, not {value!r}")
        return float(value)

    def flag(self, key: str) -> bool:
        value = self.values.get(key, False)
        if type(value) is not bool:
            raise self.wrong(key, f"must be true or false, not {value!r}")
        return value

    def of_model(self, key: str) -> str:
        return f"{self.architecture}.{key}"
