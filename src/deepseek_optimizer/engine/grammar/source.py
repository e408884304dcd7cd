"""Sources of grammars, from clients' schemas, regular expressions, EBNF and tools. Fast, and without a worker process.

Sizes are limited here, before anything is compiled.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, NamedTuple

from ...errors import RequestError
from .json_schema import normalize
from .pattern import to_rules

_MAX_CHARACTERS = {"regex": 8_192, "ebnf": 1 << 16}
_MAX_CHOICES, _MAX_OF_CHOICES = 1_000, 1 << 16  # number of choices, and their characters in total
_LARK_RULE = re.compile(r"(?m)^[ \t]*[?!]*[A-Za-z_]\w*(\.\d+)?[ \t]*:(?!:=)")


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
    return checked_source("json_schema", json.dumps(asdict(normalize(schema))), "json_schema")


def regex_source(pattern: str) -> GrammarSource:
    """Returns the source for text that a regular expression matches as a whole; errors as of `schema_source`."""
    max_characters = _MAX_CHARACTERS["regex"]
    if not isinstance(pattern, str) or not 0 < len(pattern) <= max_characters:
        raise RequestError("regex", f"must be a string of 1 to {max_characters} characters")
    try:
        rules = to_rules(pattern, "root", json_string=False)
    except ValueError as error:
        raise RequestError("regex", str(error)) from None
    return checked_source("ebnf", rules, "regex")


def ebnf_source(text: str) -> GrammarSource:
    """Returns the source for a grammar in GBNF, llama.cpp's notation, with start rule `root`; errors as of `schema_source`."""
    if not isinstance(text, str) or not 0 < len(text) <= _MAX_CHARACTERS["ebnf"]:
        raise RequestError("grammar", f"must be a string of 1 to {_MAX_CHARACTERS['ebnf']} characters")
    return checked_source("ebnf", text, "grammar")


def grammar_source(text: str) -> GrammarSource:
    """Returns the source for a grammar in GBNF (see `ebnf_source`) or in Lark's notation, whose rules have the form `name: ...`
    and whose start rule is `start`; errors as of `schema_source`."""
    if isinstance(text, str) and "::=" not in text and _LARK_RULE.search(text):
        if len(text) > _MAX_CHARACTERS["ebnf"]:
            raise RequestError("grammar", f"must have at most {_MAX_CHARACTERS['ebnf']} characters")
        return checked_source("lark", text, "grammar")
    return ebnf_source(text)


def choice_source(choices: Sequence[str]) -> GrammarSource:
    """Returns the source for one of several texts.

    Raises:
        RequestError: there is no choice, one is empty, or they are too many or too long.
    """
    if not 0 < len(choices) <= _MAX_CHOICES or not all(isinstance(choice, str) and choice for choice in choices):
        raise RequestError("choice", f"must be 1 to {_MAX_CHOICES:,} strings that are not empty")
    if sum(map(len, choices)) > _MAX_OF_CHOICES:
        raise RequestError("choice", f"the strings have more than {_MAX_OF_CHOICES:,} characters in total")
    elements = [{"type": "const_string", "value": choice} for choice in dict.fromkeys(choices)]
    structure = {"type": "structural_tag", "format": {"type": "or", "elements": elements}}
    return checked_source("structure", json.dumps(structure, ensure_ascii=False), "choice")


def checked_source(kind: str, text: str, field: str) -> GrammarSource:
    """Returns a source whose text has no characters that cannot be compiled; RequestError if it has."""
    if "\0" in text or any("\ud800" <= character <= "\udfff" for character in text):
        raise RequestError(field, "has a NUL character or an unpaired surrogate")
    return GrammarSource(kind, text, field)
