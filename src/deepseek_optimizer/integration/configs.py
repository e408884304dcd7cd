"""Contents of config.json files, completed by the defaults of Transformers' config classes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ..models import SUPPORTED
from ..models import check_config as check_fields


class _WithDefaults(Mapping[str, Any]):
    """A config.json's fields; those left out have the class's defaults."""

    def __init__(self, fields: Mapping[str, Any], defaults: type) -> None:
        self._fields, self._defaults = fields, defaults

    def __getitem__(self, name: str) -> Any:
        if name in self._fields:
            return self._fields[name]
        default = getattr(self._defaults, name, property())
        if isinstance(default, property):  # rope_scaling, for one: it has no value without an object
            raise KeyError(name)
        return default

    def __iter__(self) -> Iterator[str]:
        return iter(self._fields)

    def __len__(self) -> int:
        return len(self._fields)


def with_defaults(raw: Any) -> Any:
    """The content of a config.json with its class's defaults for fields left out; as it is where the family is not known."""
    if not isinstance(raw, Mapping) or raw.get("model_type") not in SUPPORTED:
        return raw
    from transformers import CONFIG_MAPPING  # takes long to import

    return _WithDefaults(raw, CONFIG_MAPPING[raw["model_type"]])


def check_config(raw: Any) -> None:
    """Checks the content of a config.json before Transformers makes an object, or memory is taken, from it.

    Raises:
        UnsupportedModelError: the family, or a feature the config asks for, is not known here.
        ConfigError: a field is wrong; the message names it.
    """
    check_fields(with_defaults(raw))
