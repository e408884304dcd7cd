"""Conservative test whether a value can be valid under two schemas, without solving them; `oneOf` requires that none can.

The schemas must have been checked (`schema_shapes.check_shapes`) and must not be references.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .schema_shapes import TYPES


def disjoint(schemas: Sequence[Any]) -> bool:
    """Whether no value is valid under two of the schemas, by types, enumerated values, or those of a required property."""
    facts = [_facts(schema) for schema in schemas]
    return all(_differ(a, b) for i, a in enumerate(facts) for b in facts[:i])


def is_of_type(value: Any, name: str) -> bool:
    """Whether a JSON value has the JSON schema type `name`."""
    if isinstance(value, bool) or value is None:
        return name == ("null" if value is None else "boolean")
    if isinstance(value, (int, float)):
        return name == "number" or (name == "integer" and (isinstance(value, int) or value.is_integer()))
    return name == ("string" if isinstance(value, str) else "array" if isinstance(value, list) else "object")


def canonical(value: Any) -> str:
    """Returns a text that is the same for values that JSON schema regards as equal: 1 and 1.0 are, 1 and true are not."""
    return json.dumps(_with_integers(value), sort_keys=True)


def _with_integers(value: Any) -> Any:
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, list):
        return [_with_integers(item) for item in value]
    if isinstance(value, dict):
        return {key: _with_integers(item) for key, item in value.items()}
    return value


@dataclass(frozen=True)
class _Facts:
    """What holds for all values that are valid under a schema.

    Attributes:
        types: the possible types.
        values: the possible values in `canonical` form; None: unknown.
        required: required property -> its possible values in `canonical` form.
    """

    types: frozenset[str]
    values: frozenset[str] | None
    required: Mapping[str, frozenset[str]]


def _facts(schema: Any) -> _Facts:
    if not isinstance(schema, dict):
        return _Facts(frozenset(TYPES), None, {})
    listed = _listed(schema)
    if listed is not None:
        types = {name for value in listed for name in TYPES if is_of_type(value, name)}
        return _Facts(frozenset(types), frozenset(map(canonical, listed)), {})
    named = schema.get("type", list(TYPES))
    types = set(named if isinstance(named, list) else [named])
    required = {}
    if types == {"object"}:
        properties = schema.get("properties", {})
        for key in schema.get("required", []):
            values = _listed(properties.get(key))
            if values is not None:
                required[key] = frozenset(map(canonical, values))
    return _Facts(frozenset(types | {"integer"} if "number" in types else types), None, required)


def _listed(schema: Any) -> list[Any] | None:
    """Returns the values of an enum or const; None: the schema has neither."""
    if not isinstance(schema, dict):
        return None
    return [schema["const"]] if "const" in schema else schema.get("enum")


def _differ(a: _Facts, b: _Facts) -> bool:
    """Whether no value is valid under both schemas."""
    if not a.types & b.types:
        return True
    if a.values is not None and b.values is not None:
        return not a.values & b.values
    return any(not a.required[key] & b.required[key] for key in a.required.keys() & b.required.keys())
