"""Whether two schemas may both hold for one value, as far as can be seen without solving them; `oneOf` needs that none do.

What is compared must have been checked (`schema_shapes.check_shapes`) and hold no reference at its top.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .schema_shapes import TYPES


def disjoint(schemas: Sequence[Any]) -> bool:
    """Whether no value meets two of them: by their types, their listed values, or those of a required property."""
    facts = [_facts(schema) for schema in schemas]
    return all(_differ(a, b) for i, a in enumerate(facts) for b in facts[:i])


def is_of_type(value: Any, name: str) -> bool:
    """Whether a value of JSON has a type of JSON schema."""
    if isinstance(value, bool) or value is None:
        return name == ("null" if value is None else "boolean")
    if isinstance(value, (int, float)):
        return name == "number" or (name == "integer" and (isinstance(value, int) or value.is_integer()))
    return name == ("string" if isinstance(value, str) else "array" if isinstance(value, list) else "object")


def canonical(value: Any) -> str:
    """The same text for values that are equal in JSON schema: 1 and 1.0 are, 1 and true are not."""
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
    """What is known of all values of a schema.

    Attributes:
        types: one of these.
        values: one of these, in `canonical` form; None: not known.
        required: property -> the values that it must have one of.
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
    """The values of an enum or a const."""
    if not isinstance(schema, dict):
        return None
    return [schema["const"]] if "const" in schema else schema.get("enum")


def _differ(a: _Facts, b: _Facts) -> bool:
    """Whether no value meets both schemas."""
    if not a.types & b.types:
        return True
    if a.values is not None and b.values is not None:
        return not a.values & b.values
    return any(not a.required[key] & b.required[key] for key in a.required.keys() & b.required.keys())
