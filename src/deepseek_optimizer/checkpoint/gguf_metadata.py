"""Typed access to the metadata of a GGUF file."""

from __future__ import annotations

import math

from ..errors import CheckpointError
from .files import DataFile
from .gguf_header import GgufArray, GgufHeader, read_array


class Metadata:
    """The values of a header, with their types checked. Methods raise CheckpointError, which names the key and the file."""

    def __init__(self, header: GgufHeader, file: DataFile) -> None:
        self.values, self.tensors, self.path = header.values, header.tensors, file.path
        self._file = file
        self.architecture = self.text("general.architecture")

    @property
    def layers(self) -> int:
        """Number of layers without those for multi-token prediction, which `block_count` may include."""
        blocks = self.integer(self.of_model("block_count"))
        extra = self.integer(self.of_model("nextn_predict_layers"), 0, minimum=0)
        if extra >= blocks:
            raise self.wrong(self.of_model("nextn_predict_layers"), f"is {extra}, but must be less than block_count, {blocks}")
        return blocks - extra

    def has(self, key: str) -> bool:
        """Whether the header has the key of this architecture."""
        return self.of_model(key) in self.values

    def wrong(self, key: str, what: str) -> CheckpointError:
        """An error about the value of a key, to be raised."""
        return CheckpointError(f"{key} {what}", file=self.path)

    def text(self, key: str, default: str | None = None) -> str:
        """The value of a key that must be a string."""
        value = self.values.get(key, default)
        if not isinstance(value, str):
            raise self.wrong(key, "is missing" if value is None else f"must be a string, not {value!r}")
        return value

    def integer(self, key: str, default: int | None = None, minimum: int = 1) -> int:
        """The value of a key that must be an integer in [minimum, 2^31)."""
        value = self.values.get(key, default)
        if type(value) is not int or not minimum <= value < 1 << 31:
            raise self.wrong(key, "is missing" if value is None else f"must be an integer >= {minimum}, not {value!r}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """The value of a key that must be a positive, finite number."""
        value = self.values.get(key, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or value <= 0:
            raise self.wrong(key, "is missing" if value is None else f"must be a positive number, not {value!r}")
        return float(value)

    def flag(self, key: str) -> bool:
        """The value of a key that must be a boolean; False if it is missing."""
        value = self.values.get(key, False)
        if type(value) is not bool:
            raise self.wrong(key, f"must be true or false, not {value!r}")
        return value

    def per_layer(self, key: str) -> list[int] | None:
        """The value of this architecture's key for each layer: integers or booleans, or one for all; None if it is missing."""
        name = self.of_model(key)
        value = self.values.get(name)
        if value is None:
            return None
        values = read_array(self._file, value) if isinstance(value, GgufArray) else [value] * self.layers
        if not all(isinstance(item, int) and item >= 0 for item in values) or len(values) < self.layers:
            raise self.wrong(name, f"must be an integer >= 0 for each of {self.layers} layers, not {values[:100]!r}")
        return [int(item) for item in values[: self.layers]]

    def of_model(self, key: str) -> str:
        """The full name of an architecture-specific key."""
        return f"{self.architecture}.{key}"
