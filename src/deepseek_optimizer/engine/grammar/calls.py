"""Sources of grammars for tool calls, in the syntax in which a model writes them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeAlias

from ...errors import RequestError, excerpt, shown
from .json_schema import Enforced, normalize
from .source import GrammarSource, checked_source

MAX_CALLS = 128  # maximum number of calls in one answer
_MAX_OF_TOOLS = 1 << 20  # characters of the schemas of all tools together
_MAX_IN_AUTO = 1 << 16  # the same, up to which arguments follow the schemas with "auto"; larger ones take too long to compile
_KEY = "[A-Za-z0-9_.-]{1,64}"  # a parameter that the schema does not name

Format = dict[str, Any]  # of xgrammar's structural tags; `job` replaces `Enforced` schemas by grammars


@dataclass(frozen=True)
class Pattern:
    """Text of a call that may vary, such as its number.

    Attributes:
        regex: regular expression that matches it.
        example: text that matches, for the description of the syntax.
    """

    regex: str
    example: str = ""


Parts: TypeAlias = str | tuple[str | Pattern, ...]  # the last part is a string, which shows where the text ends


@dataclass(frozen=True)
class ParameterShape:
    """How a model writes one argument, if arguments are not JSON: before NAME between VALUE after.

    Strings are written verbatim, and end where `after` begins; other values are JSON.

    Attributes:
        json_between: replaces `between` if the value is JSON; None: it is the same.
    """

    before: Parts
    between: Parts
    after: str
    json_between: Parts | None = None


@dataclass(frozen=True)
class CallShape:
    """How a model writes tool calls: begin, calls (before NAME between ARGUMENTS after) joined by separator, end.

    Attributes:
        trigger: start of `begin`, or of `before` without one, that occurs only in calls. In an answer that may have text and
            calls, the grammar applies after it. "": calls cannot be told from text until they are complete.
        parameters: how each argument is written; None: the arguments are one JSON object.
    """

    before: Parts
    between: Parts
    after: Parts
    separator: str = ""
    begin: str = ""
    end: str = ""
    trigger: str = ""
    parameters: ParameterShape | None = None


def tools_source(
    tools: Sequence[Mapping[str, Any]],
    choice: str,
    shape: CallShape,
    parallel: bool = True,
    form: GrammarSource | None = None,
) -> GrammarSource | None:
    """Returns the source for answers with tool calls whose arguments are valid under the tools' schemas.

    Args:
        tools: tools in the format of OpenAI's API.
        choice: "required" for calls of any of them without other text; the name of the tool to call; "auto" for text and calls.
        shape: how the model writes calls.
        parallel: whether several calls are allowed.
        form: with "auto", grammar of an answer without calls. None: any text, in which calls begin with the shape's trigger.

    Returns: None if the text is not constrained: "none", or "auto" and a shape without a trigger. With "auto", arguments may be
        any JSON object if the schema of a tool cannot be enforced, or the schemas are too large.

    Raises:
        RequestError: as of `schema_source`, or there is no tool to call.
    """
    auto = choice == "auto"
    if choice == "none" or (auto and form is None and not shape.trigger):
        return None
    functions = [tool["function"] for tool in tools if auto or choice in ("required", tool["function"]["name"])]
    if not functions:
        raise RequestError("tool_choice", f"there is no tool {shown(choice)}" if tools else "there are no tools to call")
    if check_size(functions) > _MAX_IN_AUTO and auto:
        functions = [{"name": function["name"]} for function in functions]
    if auto and form is None:
        rest = without_prefix(_calls(functions, shape, parallel and bool(shape.end), loose=True), shape.trigger)
        wanted: Format = {"type": "dispatch", "rules": [[shape.trigger, rest]], "loop": parallel}
    else:
        wanted = _calls(functions, shape, parallel, loose=auto)
    if form is not None:
        wanted = either([wanted, as_format(form)])
    return structure_source(wanted, "tools")


def structure_source(wanted: Format, field: str) -> GrammarSource:
    """Returns the source for a format of xgrammar's structural tags in which special tokens are tokens; errors as of
    `checked_source`."""
    return checked_source("calls", json.dumps({"type": "structural_tag", "format": wanted}), field)


def as_format(source: GrammarSource) -> Format:
    """Returns a grammar as a format, to be used within another one.

    Raises:
        RequestError: this kind of grammar cannot be part of another one.
    """
    if source.kind == "json_object":
        return asdict(normalize({"type": "object"}))
    if source.kind == "json_schema":
        return dict(json.loads(source.text))
    if source.kind == "ebnf":
        return {"type": "grammar", "grammar": source.text}
    if source.kind in ("structure", "calls"):
        return dict(json.loads(source.text)["format"])
    raise RequestError(source.field, "this kind of grammar is not supported together with tools or channels")


def sequence(parts: Iterable[Format]) -> Format:
    """Returns formats one after another, with adjacent strings joined."""
    out: list[Format] = []
    for part in parts:
        for one in part["elements"] if part.get("type") == "sequence" else [part]:
            if one == text(""):
                continue
            if out and one.get("type") == out[-1].get("type") == "const_string":
                out[-1] = text(out[-1]["value"] + one["value"])
            else:
                out.append(one)
    return out[0] if len(out) == 1 else {"type": "sequence", "elements": out or [text("")]}


def either(options: Sequence[Format]) -> Format:
    """Returns a format that matches any of the formats."""
    return options[0] if len(options) == 1 else {"type": "or", "elements": list(options)}


def text(value: str) -> Format:
    """Returns a fixed text as a format."""
    return {"type": "const_string", "value": value}


def parts_of(parts: Parts) -> Format:
    """Returns parts as a format."""
    several = (parts,) if isinstance(parts, str) else parts
    return sequence(text(p) if isinstance(p, str) else {"type": "regex", "pattern": p.regex} for p in several)


def without_prefix(wanted: Format, prefix: str) -> Format:
    """Returns a format without a fixed text at its beginning."""
    first, *rest = wanted["elements"] if wanted.get("type") == "sequence" else [wanted]
    assert first["type"] == "const_string" and first["value"].startswith(prefix), prefix
    return sequence([text(first["value"][len(prefix) :]), *rest])


def check_size(functions: Sequence[Mapping[str, Any]]) -> int:
    """Returns the number of characters of the schemas; raises RequestError if they are too large."""
    size = sum(len(json.dumps(function.get("parameters"))) for function in functions)
    if size > _MAX_OF_TOOLS:
        raise RequestError("tools", f"their parameters have {size:,} characters in total; the maximum is {_MAX_OF_TOOLS:,}")
    return size


def arguments_schema(function: Mapping[str, Any], loose: bool) -> Enforced:
    """Returns the normalized schema of a tool's arguments, which must be an object.

    Args:
        loose: return the schema of any object if the tool's own cannot be enforced.

    Raises:
        RequestError: see `normalize`.
    """
    name, schema = excerpt(function["name"]), function.get("parameters") or {}
    try:
        if not isinstance(schema, Mapping):
            raise RequestError("tools", f"parameters of {name}: must be an object")
        return normalize({"type": "object", **schema})
    except RequestError as error:
        if loose:
            return normalize({"type": "object"})
        if error.field == "tools":
            raise
        raise RequestError("tools", f"parameters of {name}: {str(error).partition(': ')[2]}") from None


def _calls(functions: Sequence[Mapping[str, Any]], shape: CallShape, several: bool, loose: bool) -> Format:
    named = [
        sequence([text(function["name"]), parts_of(shape.between), _arguments(arguments_schema(function, loose), shape)])
        for function in functions
    ]
    call = sequence([parts_of(shape.before), either(named), parts_of(shape.after)])
    more = []
    if several:
        more = [{"type": "repeat", "min": 0, "max": MAX_CALLS - 1, "content": sequence([text(shape.separator), call])}]
    return sequence([text(shape.begin), call, *more, text(shape.end)])


def _arguments(enforced: Enforced, shape: CallShape) -> Format:
    if shape.parameters is None:
        return asdict(enforced)
    schema, out = enforced.schema, []
    properties = schema.get("properties", {})
    for name, value in properties.items():
        one = _parameter(text(name), {"$defs": schema.get("$defs", {}), **value}, enforced.rules, shape.parameters)
        out.append(one if name in schema.get("required", ()) else {"type": "optional", "content": one})
    more = schema.get("additionalProperties", False if schema.get("type") == "object" else {})
    if more is not False:
        value = {"$defs": schema.get("$defs", {}), **(more if isinstance(more, dict) else {})}
        one = _parameter({"type": "regex", "pattern": _KEY}, value, enforced.rules, shape.parameters)
        out.append({"type": "repeat", "min": 0, "max": MAX_CALLS, "content": one})
    return sequence(out)


def _parameter(name: Format, schema: dict[str, Any], rules: dict[str, str], shape: ParameterShape) -> Format:
    before, after = parts_of(shape.before), text(shape.after)
    options = []
    if _may_be(schema, schema["$defs"], string=True):
        options.append([parts_of(shape.between), *_verbatim(schema, rules, shape.after)])
    if not options or (shape.json_between is not None and _may_be(schema, schema["$defs"], string=False)):
        between = shape.between if shape.json_between is None else shape.json_between
        options.append([parts_of(between), asdict(Enforced(schema, rules)), after])
    return sequence([before, name, either([sequence(option) for option in options])])


def _may_be(schema: Any, shared: Mapping[str, Any], string: bool, seen: tuple[str, ...] = ()) -> bool:
    """Whether a value of a normalized schema may be a string, or may be something else."""
    reference = schema.get("$ref")
    if reference is not None:
        name = reference.rpartition("/")[2]
        return name not in seen and _may_be(shared[name], shared, string, (*seen, name))
    if "anyOf" in schema:
        return any(_may_be(branch, shared, string, seen) for branch in schema["anyOf"])
    if "enum" in schema:
        return any(isinstance(value, str) is string for value in schema["enum"])
    return "type" not in schema or (schema["type"] == "string") is string


def _verbatim(schema: Mapping[str, Any], rules: Mapping[str, str], end: str) -> list[Format]:
    """A string that is written verbatim, and its end. Its length is bounded from above only."""
    if "enum" in schema:
        values = [value if isinstance(value, str) else json.dumps(value) for value in schema["enum"]]
        return [either([text(value) for value in values]), text(end)]
    if "pattern" in schema:  # its rules are those of the text in JSON, which is the same without quotes and backslashes
        name = schema["pattern"][1:-1]
        return [{"type": "grammar", "grammar": f"root ::= {name}\n{rules[name]}"}, text(end)]
    content: Format = {"type": "any_text"}
    if "maxLength" in schema:
        content["max_chars"] = schema["maxLength"]
    return [{"type": "tag", "begin": "", "content": content, "end": end}]
