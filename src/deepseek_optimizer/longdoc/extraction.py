"""Data that is extracted part by part: what a part may leave open, and how the parts' values become one.

By a plain rule: arrays are joined, each item once; objects are merged key by key; of anything else the first value that is not
null counts, in the document's order.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from ..errors import MissingPackageError

_LEAST = ("minItems", "minProperties")


def relaxed(schema: Mapping[str, Any]) -> dict[str, Any]:
    """The schema of what one part says: an object whose fields may be null, and its lists empty."""
    fields = {name: _open(field) for name, field in schema["properties"].items()}
    rest = {name: value for name, value in schema.items() if name not in _LEAST}
    return {**rest, "type": "object", "properties": fields, "required": list(fields)}


def merged(values: Iterable[Any]) -> Any:
    """One value of several, in their order."""
    present = [value for value in values if value is not None]
    if not present:
        return None
    first = present[0]
    if isinstance(first, dict):
        objects = [value for value in present if isinstance(value, dict)]
        names = list(dict.fromkeys(name for value in objects for name in value))
        return {name: merged(value.get(name) for value in objects) for name in names}
    if isinstance(first, list):
        once: dict[str, Any] = {}
        for item in (item for value in present if isinstance(value, list) for item in value):
            once.setdefault(json.dumps(item, sort_keys=True), item)
        return list(once.values())
    return first


def without_gaps(value: Any, schema: Mapping[str, Any]) -> Any:
    """A merged object without the null fields that it need not have."""
    required = schema.get("required", ())
    return {name: item for name, item in value.items() if item is not None or name in required}


def problems(schema: Mapping[str, Any], value: Any) -> list[str]:
    """Where a value is not valid under a schema, in sentences.

    Raises:
        MissingPackageError: jsonschema-rs is not installed.
    """
    try:
        from jsonschema_rs import validator_for
    except ImportError:
        raise MissingPackageError("extraction", "jsonschema-rs", "longdoc") from None
    found = []
    for error in validator_for(dict(schema)).iter_errors(value):
        where = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in error.instance_path).lstrip(".")
        found.append(f"{where or 'the answer'}: {error.message}")
    return found


def _open(field: Any) -> Any:
    if not isinstance(field, Mapping):
        return field
    if field.get("type") == "array":
        return {name: value for name, value in field.items() if name not in _LEAST}
    if field.get("type") == "object" and isinstance(field.get("properties"), Mapping):
        return relaxed(field)
    return {"anyOf": [dict(field), {"type": "null"}]}
