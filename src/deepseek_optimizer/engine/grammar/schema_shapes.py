"""Checks the values of JSON schema keywords.

A whole schema object is checked before any of its keywords is used, so that the code that uses a keyword can rely on its value.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from ...errors import RequestError, excerpt

MAX_LENGTH = 1 << 16
MAX_PATTERN = 2_048
TYPES = ("object", "array", "string", "integer", "number", "boolean", "null")
FIELD = "json_schema"


def refuse(at: str, message: str) -> NoReturn:
    """Raises RequestError for a part of a schema.

    Args:
        at: the part, as a JSON pointer.
        message: what is wrong with it.
    """
    raise RequestError(FIELD, f"{excerpt(at)}: {message}")


def check_shapes(schema: Mapping[str, Any], at: str) -> None:
    """Checks the values of all known keywords of a schema object.

    Args:
        schema: the schema object.
        at: its JSON pointer, for errors.

    Raises:
        RequestError: a keyword's value is invalid.
    """
    for keyword, value in schema.items():
        if keyword in _SHAPES:
            fits, text = _SHAPES[keyword]
            if not fits(value):
                refuse(at, f"{keyword} must be {text}")


def _is_type(value: Any) -> bool:
    names = value if isinstance(value, list) else [value]
    return bool(names) and all(name in TYPES for name in names)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MAX_LENGTH


def _is_number(value: Any) -> bool:
    if isinstance(value, float):
        return math.isfinite(value)
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) <= 1 << 1000  # fits in a float


def _is_schema(value: Any) -> bool:
    return isinstance(value, (Mapping, bool))


def _are_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


_Shape = tuple[Callable[[Any], bool], str]
_COUNT: _Shape = (_is_count, f"an integer from 0 to {MAX_LENGTH}")
_NUMBER: _Shape = (_is_number, "a number")
_SCHEMAS: _Shape = (lambda value: isinstance(value, Mapping) and all(map(_is_schema, value.values())), "an object of schemas")
_CHOICES: _Shape = (lambda value: isinstance(value, list) and bool(value) and all(map(_is_schema, value)), "a list of schemas")
_SHAPES: dict[str, _Shape] = {
    "type": (_is_type, f"one of {', '.join(TYPES)}, or a list of them"),
    "enum": (lambda value: isinstance(value, list), "a list"),
    "$ref": (lambda value: isinstance(value, str), "a string"),
    "$defs": _SCHEMAS,
    "definitions": _SCHEMAS,
    "anyOf": _CHOICES,
    "oneOf": _CHOICES,
    "allOf": _CHOICES,
    "properties": _SCHEMAS,
    "required": (_are_names, "a list of names"),
    "additionalProperties": (_is_schema, "a schema"),
    "minProperties": _COUNT,
    "maxProperties": _COUNT,
    "items": (_is_schema, "one schema; put schemas of single positions into prefixItems"),
    "prefixItems": (lambda value: isinstance(value, list) and all(map(_is_schema, value)), "a list of schemas"),
    "minItems": _COUNT,
    "maxItems": _COUNT,
    "minLength": _COUNT,
    "maxLength": _COUNT,
    "pattern": (
        lambda value: isinstance(value, str) and len(value) <= MAX_PATTERN,
        f"a string of at most {MAX_PATTERN:,} characters",
    ),
    "format": (lambda value: isinstance(value, str), "a string"),
    "minimum": _NUMBER,
    "maximum": _NUMBER,
    "exclusiveMinimum": _NUMBER,
    "exclusiveMaximum": _NUMBER,
}
