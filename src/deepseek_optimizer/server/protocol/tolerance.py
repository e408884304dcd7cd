"""Validation that ignores unknown fields and converts types, for clients that were written for other servers."""

from __future__ import annotations

import functools
from typing import Any

from pydantic import AliasChoices, BaseModel, ValidationError

from .base import Model, field_error, parse

MAX_IGNORED = 32  # names of ignored fields that are collected from one body
_HOLDERS = frozenset({dict, list})


def parse_tolerantly(model: type[Model], body: dict[str, Any]) -> tuple[Model, list[str]]:
    """Validates a body as vLLM does: unknown fields are ignored at every level, and values are converted to the type of their
    field where pydantic can (`"0.7"` to 0.7, `16.0` and `"16"` to 16, 1 to true).

    Args:
        model: of the body.
        body: the parsed JSON.

    Returns: the validated body, and the ignored fields, such as `messages.timestamp`; at most MAX_IGNORED of them.

    Raises:
        ApiError: 400, a field is invalid; see `field_error`.
    """
    try:
        return model.model_validate(body), []
    except ValidationError:  # only then is a second, tolerant validation necessary
        pass
    try:
        parsed = model.model_validate(body, strict=False, extra="ignore")
    except ValidationError as error:
        raise field_error(error, body) from None
    return parsed, _unknown_fields(parsed, body)


def parse_body(model: type[Model], body: dict[str, Any], strict: bool) -> tuple[Model, list[str]]:
    """Validates a body by `parse` or, unless `strict`, by `parse_tolerantly`, whose result and errors it has."""
    return (parse(model, body), []) if strict else parse_tolerantly(model, body)


def _unknown_fields(parsed: BaseModel, body: dict[str, Any]) -> list[str]:
    """The fields in `body` that the models of `parsed` do not have, without the indices of lists."""
    unknown: dict[str, None] = {}
    remaining: list[tuple[Any, Any, str]] = [(parsed, body, "")]
    while remaining and len(unknown) < MAX_IGNORED:
        value, given, path = remaining.pop()
        if isinstance(value, BaseModel) and isinstance(given, dict):
            attributes = _attributes(type(value))
            for name, item in given.items():
                if name not in attributes:
                    unknown[path + name] = None
                elif type(item) in _HOLDERS:
                    remaining.append((getattr(value, attributes[name]), item, f"{path}{name}."))
        elif isinstance(value, list) and type(given) is list and not _HOLDERS.isdisjoint(map(type, given)):
            remaining += [(one, item, path) for one, item in zip(value, given, strict=False)]
    return list(unknown)[:MAX_IGNORED]


@functools.cache
def _attributes(model: type[BaseModel]) -> dict[str, str]:
    """The attribute of a model for each name that a body may use for it."""
    attributes: dict[str, str] = {}
    for attribute, field in model.model_fields.items():
        alias = field.validation_alias
        names = alias.choices if isinstance(alias, AliasChoices) else [alias or attribute]
        attributes |= {name: attribute for name in names if isinstance(name, str)}
    return attributes
