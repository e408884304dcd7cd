"""What a grammar is compiled from, made of what clients send: schemas, regular expressions, EBNF, tools. Quick, and no process.

Sizes are bounded here, before anything is compiled.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from ...errors import RequestError, excerpt, shown
from .json_schema import Enforced, normalise
from .pattern import to_rules

_MAX_CHARACTERS = {"regex": 8_192, "ebnf": 1 << 16}
_MAX_OF_TOOLS = 1 << 20  # characters of the schemas of all tools together


class GrammarSource(NamedTuple):
    """
    Attributes:
        kind: of the job that compiles it (`grammar_job`).
        text: for that job.
        field: of the request, which errors name.
    """

    kind: str
    text: str
    field: str


@dataclass(frozen=True)
class CallShape:
    """How a model writes calls of tools: `begin (before NAME between ARGUMENTS after, separator between them) end`."""

    before: str
    between: str
    after: str
    separator: str = ""
    begin: str = ""
    end: str = ""


def object_source() -> GrammarSource:
    """Any JSON object."""
    return GrammarSource("json_object", "", "response_format")


def schema_source(schema: Mapping[str, Any] | str) -> GrammarSource:
    """JSON that is valid under a schema. Of what it leaves open, the grammar may allow less.

    Raises:
        RequestError: the schema is wrong, too large, or has what can't be enforced.
    """
    return _checked("json_schema", json.dumps(asdict(normalise(schema))), "json_schema")


def regex_source(pattern: str) -> GrammarSource:
    """Text that a regular expression matches from beginning to end; errors as of `schema_source`."""
    most = _MAX_CHARACTERS["regex"]
    if not isinstance(pattern, str) or not 0 < len(pattern) <= most:
        raise RequestError("regex", f"must be a string of 1 to {most} characters")
    try:
        rules = to_rules(pattern, "root", json_string=False)
    except ValueError as error:
        raise RequestError("regex", str(error)) from None
    return _checked("ebnf", rules, "regex")


def ebnf_source(text: str) -> GrammarSource:
    """Text of a grammar in GBNF, llama.cpp's notation, whose first rule is `root`; errors as of `schema_source`."""
    if not isinstance(text, str) or not 0 < len(text) <= _MAX_CHARACTERS["ebnf"]:
        raise RequestError("grammar", f"must be a string of 1 to {_MAX_CHARACTERS['ebnf']} characters")
    return _checked("ebnf", text, "grammar")


def tools_source(
    tools: Sequence[Mapping[str, Any]], choice: str, shape: CallShape, parallel: bool = True
) -> GrammarSource | None:
    """Calls whose arguments are valid under the tools' schemas, and nothing else.

    Args:
        tools: as OpenAI's API has them.
        choice: "required" for a call of any of them, or the name of the one to call. With "auto" and "none" nothing can be
            asked of the text, and there is no grammar.
        shape: how the model writes calls.
        parallel: whether there may be several.

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
        raise RequestError("tools", f"their parameters have {size:,} characters together, and {_MAX_OF_TOOLS:,} are the most")
    calls = [  # as xgrammar's structural tags, but for the contents, which the job makes into grammars
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
    return _checked("structure", json.dumps(structure), "tools")


def _checked(kind: str, text: str, field: str) -> GrammarSource:
    if "\0" in text or any("\ud800" <= character <= "\udfff" for character in text):
        raise RequestError(field, "has a NUL or half of a surrogate pair")
    return GrammarSource(kind, text, field)


def _parameters(function: Mapping[str, Any]) -> Enforced:
    """The schema of a tool's arguments, which are an object."""
    name, schema = excerpt(function["name"]), function.get("parameters") or {}
    if not isinstance(schema, Mapping):
        raise RequestError("tools", f"parameters of {name}: must be an object")
    try:
        return normalise({"type": "object", **schema})
    except RequestError as error:
        raise RequestError("tools", f"parameters of {name}: {str(error).partition(': ')[2]}") from None
