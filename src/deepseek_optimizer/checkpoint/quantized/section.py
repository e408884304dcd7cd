"""Checks of `quantization_config` in config.json."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ...errors import UnsupportedModelError, excerpt, shown

_MAX_SIZE = 1 << 31  # of groups and blocks


class Section:
    """The fields of a `quantization_config`, checked as they are read.

    Args:
        fields: the section.
        method: its `quant_method`, as errors name it.
        file: the config.json.
    """

    def __init__(self, fields: Mapping[str, Any], method: str, file: Path) -> None:
        self.fields, self.method, self.file = fields, method, file

    def check_known(self, known: Sequence[str]) -> None:
        """UnsupportedModelError for a field that is neither among `known` nor one that all methods have: it may change how
        weights are stored."""
        allowed = {"quant_method", "modules_to_not_convert", "dequantize", *known}
        for field in self.fields:
            if field not in allowed:
                raise self.unsupported(
                    field, "is not known; remove it from config.json if it does not change how weights are stored"
                )

    def one_of(self, field: str, allowed: Sequence[Any], default: Any = None) -> Any:
        """The value of a field, or `default` if it is absent or null; UnsupportedModelError unless it is one of `allowed`.

        Without a default, the field is required.
        """
        value = self.fields.get(field)
        value = default if value is None else value
        if not any(type(value) is type(one) and value == one for one in allowed):
            names = ", ".join(str(one) for one in allowed)
            raise self.unsupported(field, f"is {shown(value)}; supported: {names}. Use the original model instead")
        return value

    def flag(self, field: str, default: bool) -> bool:
        """The value of a boolean field."""
        value: bool = self.one_of(field, (True, False), default)
        return value

    def group_size(self, field: str = "group_size", default: int = -1) -> int:
        """A group size: columns, or -1 for whole rows."""
        value = self.fields.get(field)
        value = default if value is None else value
        if value != -1 and not _is_size(value):
            raise self.unsupported(field, f"is {shown(value)}; it must be a number of columns, or -1 for whole rows")
        return int(value)

    def block(self, field: str, value: Any) -> tuple[int, int] | None:
        """Rows and columns of the blocks that share a scale, from a field's value; None if that is null."""
        if value is None:
            return None
        if not isinstance(value, list) or len(value) != 2 or not all(map(_is_size, value)):
            raise self.unsupported(field, f"is {shown(value)}; it must be two numbers, as in [128, 128]")
        return value[0], value[1]

    def unsupported(self, field: str, problem: str) -> UnsupportedModelError:
        """An error about a field."""
        return UnsupportedModelError(f"{self.file}: quantization_config.{excerpt(field)} of {self.method} {problem}")


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 < value < _MAX_SIZE
