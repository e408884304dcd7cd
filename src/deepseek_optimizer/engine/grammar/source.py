"""Sources of grammars, from clients' schemas, regular expressions, EBNF and tools. Fast, and without a worker process.

Sizes are limited here, before anything is compiled.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from ...errors import RequestError, excerpt, shown
from .json_schema import Enforced, normalize
from .pattern import to_rules

_MAX_CHARACTERS = {"regex": 8_192, "ebnf": 1 << 16}
_MAX_CHOICES, _MAX_OF_CHOICES = 1_000, 1 << 16  # number of choices, and their characters in total
_LARK_RULE = re.compile(r"(?m)^[ \t]*[?!]*[A-Za-z_]\w*(\.\d+)?[ \t]*:(?!:=)")
_MAX_OF_TOOLS = 1 << 20  # characters of the schemas of all tools together


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


@dataclass(frozen=True)
class CallShape:
    """How a model writes tool calls: begin, calls (before NAME between ARGUMENTS after) joined by separator, end."""

    before: str
    between: str
    after: str
    separator: str = ""
    begin: str = ""
    end: str = ""


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


def tools_source(
    tools: Sequence[Mapping[str, Any]], choice: str, shape: CallShape, parallel: bool = True
) -> GrammarSource | None:
    """Returns the source for tool calls whose arguments are valid under the tools' schemas, without other text.

    Args:
        tools: tools in the format of OpenAI's API.
        choice: "required" to call any of them, or the name of the tool to call. With "auto" and "none" there is no grammar.
        shape: how the model writes calls.
        parallel: whether several calls are allowed.

    Returns: None if the text is not constrained.

    Raises:
        RequestError: as of `schema_source`, or there is no tool to call.
    """
    if choice in ("auto", "none"):
        return None
    functions = [tool["function"] for tool in tools if choice in ("required", tool["function"]["name"])]
    if not functions:
        raise RequestError("tool_choice", f"there is no tool {shown(choice)}" if tools else "there are no tools to call")
    size = sum(len(json.dumps(function.get("parameters"))) for function in functions)
    if size > _MAX_OF_TOOLS:
        raise RequestError("tools", f"their parameters have {size:,} characters in total; the maximum is {_MAX_OF_TOOLS:,}")
    calls = [  # xgrammar's structural tags, except for the contents, which the job replaces by grammars
        {
            "type": "tag",
            "begin": f"{shape.before}{function['name']}{shape.between}",
            "content": asdict(_parameters(function)),
            "end": shape.after,
        }
        for function in functions
    ]
    several = {
        "type": "tags_with_separator",
        "tags": calls,
        "separator": shape.separator,
        "at_least_one": True,
        "stop_after_first": not parallel,
    }
    around = [{"type": "const_string", "value": text} for text in (shape.begin, shape.end)]
    parts = [part for part in (around[0], several, around[1]) if part.get("value") != ""]
    structure = {"type": "structural_tag", "format": {"type": "sequence", "elements": parts}}
    return checked_source("structure", json.dumps(structure), "tools")


def checked_source(kind: str, text: str, field: str) -> GrammarSource:
    """Returns a source whose text has no characters that cannot be compiled; RequestError if it has."""
    if "\0" in text or any("\ud800" <= character <= "\udfff" for character in text):
        raise RequestError(field, "has a NUL character or an unpaired surrogate")
    return GrammarSource(kind, text, field)


def _parameters(function: Mapping[str, Any]) -> Enforced:
    """Returns the normalized schema of a tool's arguments, which must be an object."""
    name, schema = excerpt(function["name"]), function.get("parameters") or {}
    if not isinstance(schema, Mapping):
        raise RequestError("tools", f"parameters of {name}: must be an object")
    try:
        return normalize({"type": "object", **schema})
    except RequestError as error:
        raise RequestError("tools", f"parameters of {name}: {str(error).partition(': ')[2]}") from None
