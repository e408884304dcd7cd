"""Arguments that are written one by one, strings verbatim, as in `<parameter=city>Rome</parameter>`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .base import read_json

_LITERALS = {"null": None, "None": None, "True": True, "False": False}  # templates write Python's for past calls


def only_text(schema: Mapping[str, Any], key: str) -> bool:
    """Whether an argument can only be a string.

    Args:
        schema: of the arguments.
        key: name of the argument.
    """
    return _types(_of(schema, key)) == {"string"}


def typed(text: str, schema: Mapping[str, Any], key: str, is_json: bool = False) -> Any:
    """The value of an argument: text if its schema allows only strings, otherwise JSON, or else text.

    Args:
        text: as the model wrote it.
        schema: of the arguments.
        key: name of the argument.
        is_json: the text is JSON whatever the schema is.
    """
    types = _types(_of(schema, key))
    if not is_json and types == {"string"}:
        return text
    stripped = text.strip()
    value = _LITERALS[stripped] if stripped in _LITERALS else read_json(stripped)
    if value is None and stripped not in _LITERALS:
        return text
    if not is_json and (isinstance(value, str) or ("string" in types and not _fits(value, types))):
        return text
    return value


def read_parameters(
    text: str, before: str, between: str, after: str, schema: Mapping[str, Any], strip: str = ""
) -> dict[str, Any] | None:
    """The arguments of a complete call; None if the text is not of this form.

    Args:
        text: of all parameters, with white space around each.
        before, between, after: strings around names and values.
        schema: of the arguments.
        strip: a character that may be at either end of a value, as layout.
    """
    arguments: dict[str, Any] = {}
    at = _skip_space(text, 0)
    while at < len(text):
        middle = text.find(between, at)
        end = text.find(after, middle)
        if not text.startswith(before, at) or middle < 0 or end < 0:
            return None
        key = text[at + len(before) : middle].strip()
        value = text[middle + len(between) : end]
        if strip:
            value = value.removeprefix(strip).removesuffix(strip)
        if not key or key in arguments:
            return None
        arguments[key] = typed(value, schema, key)
        at = _skip_space(text, end + len(after))
    return arguments


def _skip_space(text: str, at: int) -> int:
    while at < len(text) and text[at].isspace():
        at += 1
    return at


def _of(schema: Mapping[str, Any], key: str) -> Any:
    properties = schema.get("properties")
    return properties.get(key) if isinstance(properties, Mapping) else None


def _types(schema: Any) -> set[str]:
    """The types that a schema names; empty if it names none."""
    if not isinstance(schema, Mapping):
        return set()
    if isinstance(schema.get("enum"), list):
        return {_name(value) for value in schema["enum"]}
    if "const" in schema:
        return {_name(schema["const"])}
    named = schema.get("type")
    if isinstance(named, str):
        return {named}
    if isinstance(named, list):
        return {name for name in named if isinstance(name, str)}
    for key in ("anyOf", "oneOf"):
        if isinstance(schema.get(key), list):
            each = [_types(branch) for branch in schema[key]]
            return set().union(*each) if all(each) else set()
    return set()


def _fits(value: Any, types: set[str]) -> bool:
    return _name(value) in types or (_name(value) == "integer" and "number" in types)


def _name(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "boolean"
    if isinstance(value, (int, float)):
        return "integer" if isinstance(value, int) else "number"
    return "string" if isinstance(value, str) else "array" if isinstance(value, list) else "object"
