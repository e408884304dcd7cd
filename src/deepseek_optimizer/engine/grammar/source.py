"""Sources of grammars, from clients' schemas, regular expressions and EBNF. Fast, and without a worker process.

Sizes are limited here, before anything is compiled.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, NamedTuple

from ...errors import RequestError
from .json_schema import normalize
from .pattern import to_rules

_MAX_CHARACTERS = {"regex": 8_192, "ebnf": 1 << 16}


class GrammarSource(NamedTuple):
    """The checked source of a grammar.

    Attributes:
        kind: kind of source, which selects the compiler in `job`.
        text: the source.
        field: field of the request that it comes from, for errors.
    """

    kind: str
    text: str
    field: str


def object_source() -> GrammarSource:
    """Returns the source for any JSON object."""
    return GrammarSource("json_object", "", "response_format")


def schema_source(schema: Mapping[str, Any] | str) -> GrammarSource:
    """Returns the source for JSON that is valid under a schema. The grammar may allow less than the schema.

    Raises:
        RequestError: the schema is invalid, too large, or has keywords that cannot be enforced.
    """
    return checked("json_schema", json.dumps(asdict(normalize(schema))), "json_schema")


def regex_source(pattern: str) -> GrammarSource:
    """Returns the source for text that a regular expression matches as a whole; errors as of `schema_source`."""
    max_characters = _MAX_CHARACTERS["regex"]
    if not isinstance(pattern, str) or not 0 < len(pattern) <= max_characters:
        raise RequestError("regex", f"must be a string of 1 to {max_characters} characters")
    try:
        rules = to_rules(pattern, "root", json_string=False)
    except ValueError as error:
        raise RequestError("regex", str(error)) from None
    return checked("ebnf", rules, "regex")


def ebnf_source(text: str) -> GrammarSource:
    """Returns the source for a grammar in GBNF, llama.cpp's notation, with start rule `root`; errors as of `schema_source`."""
    if not isinstance(text, str) or not 0 < len(text) <= _MAX_CHARACTERS["ebnf"]:
        raise RequestError("grammar", f"must be a string of 1 to {_MAX_CHARACTERS['ebnf']} characters")
    return checked("ebnf", text, "grammar")


def checked(kind: str, text: str, field: str) -> GrammarSource:
    """Returns a source; raises RequestError if it has characters that xgrammar does not accept."""
    if "\0" in text or any("\ud800" <= character <= "\udfff" for character in text):
        raise RequestError(field, "has a NUL character or an unpaired surrogate")
    return GrammarSource(kind, text, field)
