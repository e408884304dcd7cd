"""Extraction chunk by chunk: the schema for one chunk, and the merging of the values.

Arrays are concatenated without duplicates; objects are merged key by key; of other values, the first that is not null in the
document's order is used.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from ..errors import MissingPackageError

_MINIMUMS = ("minItems", "minProperties")


def relaxed(schema: Mapping[str, Any]) -> dict[str, Any]:
    """The schema for one chunk: an object whose fields may be null and whose lists may be empty."""
    fields = {name: _open(field) for name, field in schema["properties"].items()}
    rest = {name: value for name, value in schema.items() if name not in _MINIMUMS}
    return {**rest, "type": "object", "properties": fields, "required": list(fields)}


def merged(values: Iterable[Any]) -> Any:
    """Merges values in the given order."""
    values = [value for value in values if value is not None]
    if not values:
        return None
    first = values[0]
    if isinstance(first, dict):
        objects = [value for value in values if isinstance(value, dict)]
        names = list(dict.fromkeys(name for value in objects for name in value))
        return {name: merged(value.get(name) for value in objects) for name in names}
    if isinstance(first, list):
        unique: dict[str, Any] = {}
        for item in (item for value in values if isinstance(value, list) for item in value):
            unique.setdefault(json.dumps(item, sort_keys=True), item)
        return list(unique.values())
    return first


def without_gaps(value: Any, schema: Mapping[str, Any]) -> Any:
    """A merged object without null fields that are not required."""
    required = schema.get("required", ())
    return {name: item for name, item in value.items() if item is not None or name in required}


def problems(schema: Mapping[str, Any], value: Any) -> list[str]:
    """Descriptions of where a value violates a schema.

    Raises:
        MissingPackageError: jsonschema-rs is not installed.
    """
    try:
        from jsonschema_rs import validator_for
    except ImportError:
        raise MissingPackageError("extraction", "jsonschema-rs", "longdoc") from None
    messages = []
    for error in validator_for(dict(schema)).iter_errors(value):
        where = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in error.instance_path).lstrip(".")
        messages.append(f"{where or 'the answer'}: {error.message}")
    return messages


def _open(field: Any) -> Any:
    if not isinstance(field, Mapping):
        return field
    if field.get("type") == "array":
        return {name: value for name, value in field.items() if name not in _MINIMUMS}
    if field.get("type") == "object" and isinstance(field.get("properties"), Mapping):
        return relaxed(field)
    return {"anyOf": [dict(field), {"type": "null"}]}
