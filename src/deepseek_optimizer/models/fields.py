"""Reads fields of a model's config with checks of type and range; errors name the field."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from ..errors import ConfigError, UnsupportedModelError, shown

_LARGEST_FLOAT32 = (2 - 2**-23) * 2.0**127


class Fields:
    """The fields of a config, checked when they are read.

    Args:
        config: a Transformers config object, or the content of a config.json as a mapping (`integration.configs.with_defaults`
            adds the defaults of missing fields).
        overrides: values that replace those of the config.
    """

    def __init__(self, config: Any, overrides: Mapping[str, Any] = MappingProxyType({})) -> None:
        self._config, self._overrides = config, overrides

    def with_(self, **overrides: Any) -> Fields:
        """The same fields with other values for some of them."""
        return Fields(self._config, {**self._overrides, **overrides})

    def get(self, name: str, default: Any = None) -> Any:
        """The unchecked value of a field; `default` if it is missing."""
        if name in self._overrides:
            return self._overrides[name]
        if not isinstance(self._config, Mapping):
            return getattr(self._config, name, default)
        return self._config.get(name, default)

    def integer(self, name: str, high: int, *, low: int = 1, default: int | None = None) -> int:
        """An integer from `low` to `high`; `default`, if given, replaces None. ConfigError for anything else."""
        value = self.get(name)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise ConfigError(f"config.{name}: expected an integer from {low} to {high}, got {shown(value)}")
        return value

    def positive(self, name: str) -> float:
        """A finite number above 0; ConfigError for anything else."""
        return positive(name, self.get(name))

    def epsilon(self, name: str) -> float:
        """The epsilon of a norm, a number from 0 to float32's maximum, as in Transformers; ConfigError for anything else."""
        value = self.get(name)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= _LARGEST_FLOAT32:
            raise ConfigError(f"config.{name}: expected a number from 0 to {_LARGEST_FLOAT32:.4g}, got {shown(value)}")
        return float(value)

    def flag(self, name: str) -> bool:
        """True or False; False if the field is missing. ConfigError for anything else."""
        value = self.get(name, False)
        if not isinstance(value, bool):
            raise ConfigError(f"config.{name}: expected true or false, got {shown(value)}")
        return value

    def layers(self, name: str) -> tuple[int, ...]:
        """Indices of layers, in no certain range. ConfigError for anything but a list of integers."""
        value = self.get(name)
        if not isinstance(value, (list, tuple)) or any(isinstance(i, bool) or not isinstance(i, int) for i in value):
            raise ConfigError(f"config.{name}: expected a list of layers, got {shown(value)}")
        return tuple(value)

    def require(self, name: str, only: Any) -> None:
        """Raises UnsupportedModelError unless the field equals `only`."""
        value = self.get(name)
        if value != only:
            raise UnsupportedModelError(f"config.{name} {shown(value)} is not supported. Supported: {only!r}.")

    def only(self, name: str, *allowed: Any) -> None:
        """Raises UnsupportedModelError unless the field equals one of `allowed`, with the same type (True is not 1)."""
        value = self.get(name)
        if not any(type(value) is type(a) and value == a for a in allowed):
            supported = ", ".join(repr(a) for a in allowed if a is not None)
            raise UnsupportedModelError(
                f"config.{name} {shown(value)} is not supported in this family. Supported: {supported}."
            )


def positive(name: str, value: Any) -> float:
    """`value` as a float; ConfigError if it is not a finite number above 0. `name`: the field, or entry of a field."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= sys.float_info.max:
        raise ConfigError(f"config.{name}: expected a finite number above 0, got {shown(value)}")
    return float(value)
