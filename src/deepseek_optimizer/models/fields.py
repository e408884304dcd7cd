"""Reading a model's config with suspicion: every field has a type and a range, and an error names the field."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from ..errors import ConfigError, UnsupportedModelError, shown

_LARGEST_FLOAT32 = (2 - 2**-23) * 2.0**127


class Fields:
    """A config's fields, checked as they are read.

    Args:
        config: a Transformers config object, or the mapping that a config.json holds (`integration.configs.with_defaults`
            adds the defaults of fields left out).
    """

    def __init__(self, config: Any) -> None:
        self._config = config

    def get(self, name: str, default: Any = None) -> Any:
        """The field as it stands, unchecked; `default` where there is none."""
        if not isinstance(self._config, Mapping):
            return getattr(self._config, name, default)
        return self._config.get(name, default)

    def integer(self, name: str, high: int, *, low: int = 1, default: int | None = None) -> int:
        """An integer from `low` to `high`; `default` (if there is one) stands for None."""
        value = self.get(name)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise ConfigError(f"config.{name}: expected an integer from {low} to {high}, got {shown(value)}")
        return value

    def positive(self, name: str) -> float:
        """A finite number above 0."""
        return positive(name, self.get(name))

    def epsilon(self, name: str) -> float:
        """What a norm adds to a mean of squares: a number from 0 on that float32 holds, as Transformers takes it."""
        value = self.get(name)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= _LARGEST_FLOAT32:
            raise ConfigError(f"config.{name}: expected a number from 0 to {_LARGEST_FLOAT32:.4g}, got {shown(value)}")
        return float(value)

    def flag(self, name: str) -> bool:
        """True or False; False where there is none."""
        value = self.get(name, False)
        if not isinstance(value, bool):
            raise ConfigError(f"config.{name}: expected true or false, got {shown(value)}")
        return value

    def require(self, name: str, only: Any) -> None:
        """Refuses every value but the one that is built here."""
        value = self.get(name)
        if value != only:
            raise UnsupportedModelError(f"config.{name} {shown(value)} is not supported. Supported: {only!r}.")

    def only(self, name: str, *allowed: Any) -> None:
        """Refuses every value but these; True is not 1 here."""
        value = self.get(name)
        if not any(type(value) is type(a) and value == a for a in allowed):
            known = ", ".join(repr(a) for a in allowed if a is not None)
            raise UnsupportedModelError(f"config.{name} {shown(value)} is not supported in this family. Supported: {known}.")


def positive(name: str, value: Any) -> float:
    """`value` if it is a finite number above 0, for the field (or entry of a field) called `name`."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= sys.float_info.max:
        raise ConfigError(f"config.{name}: expected a finite number above 0, got {shown(value)}")
    return float(value)
