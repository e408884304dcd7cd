"""Contents of config.json files, completed with the defaults of Transformers' config classes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ..models import SUPPORTED
from ..models import check_config as check_fields


class _WithDefaults(Mapping[str, Any]):
    """The fields of a config.json; missing fields have the config class's defaults."""

    def __init__(self, fields: Mapping[str, Any], defaults: type) -> None:
        self._fields, self._defaults = fields, defaults

    def __getitem__(self, name: str) -> Any:
        stored = getattr(self._defaults, "attribute_map", {}).get(name, name)
        for key in (name, stored):
            if key in self._fields:
                return self._fields[key]
        default = getattr(self._defaults, name, property())
        if isinstance(default, property):  # such as rope_scaling: it has no value without an instance
            raise KeyError(name)
        return default

    def __iter__(self) -> Iterator[str]:
        return iter(self._fields)

    def __len__(self) -> int:
        return len(self._fields)


def with_defaults(raw: Any) -> Any:
    """The content of a config.json with the config class's defaults for missing fields; unchanged for unsupported families."""
    if not isinstance(raw, Mapping) or raw.get("model_type") not in SUPPORTED:
        return raw
    from transformers import CONFIG_MAPPING  # slow to import

    return _WithDefaults(raw, CONFIG_MAPPING[raw["model_type"]])


def check_config(raw: Any) -> None:
    """Checks the content of a config.json before Transformers creates an object from it or memory is allocated.

    Raises:
        UnsupportedModelError: the family, or a feature that the config requires, is not supported.
        ConfigError: a field is not valid; the message names it.
    """
    check_fields(with_defaults(raw))
