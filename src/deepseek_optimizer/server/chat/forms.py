"""The form that an answer's text must have, from the fields of other servers' APIs for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from ...engine.grammar.source import (
    GrammarSource,
    choice_source,
    grammar_source,
    object_source,
    regex_source,
    schema_source,
)
from ...engine.grammar.structural_tag import structural_tag_source
from ..http.problems import ApiError
from ..protocol.formats import (
    Guided,
    JsonObjectFormat,
    JsonSchemaFormat,
    ResponseFormat,
    StructuralTagFormat,
    StructuredOutputs,
)

Kind = Literal["json_object", "json_schema", "regex", "grammar", "choice", "structural_tag"]
# Fields with a value of the form itself, and that form.
_FIELDS: tuple[tuple[str, Kind], ...] = (
    ("guided_json", "json_schema"),
    ("guided_regex", "regex"),
    ("guided_choice", "choice"),
    ("guided_grammar", "grammar"),
    ("json_schema", "json_schema"),
    ("grammar", "grammar"),
    ("regex", "regex"),
    ("ebnf", "grammar"),
)
_OF_STRUCTURED_OUTPUTS: tuple[tuple[str, Kind], ...] = (
    ("json_", "json_schema"),
    ("regex", "regex"),
    ("choice", "choice"),
    ("grammar", "grammar"),
    ("structural_tag", "structural_tag"),
)


@dataclass(frozen=True)
class Form:
    """The required form of an answer's text. `value`: a schema, a pattern, a grammar, a list of texts or a structural tag."""

    kind: Kind
    value: Any = None


def form_of(guided: Guided) -> Form | None:
    """The form that the fields of a request require; None if they require none.

    Raises:
        ApiError: 400, more than one form.
    """
    forms = list(_forms(guided))
    if len(forms) > 1:
        names = [name for name, _ in forms]
        raise ApiError(400, f"{names[1]}: give only one of {', '.join(names)}", param=names[1])
    return forms[0][1] if forms else None


def source_of(form: Form) -> GrammarSource:
    """The source of a form's grammar.

    Raises:
        RequestError: the form is invalid or too large.
    """
    make: dict[Kind, Callable[[], GrammarSource]] = {
        "json_object": object_source,
        "json_schema": lambda: schema_source(form.value),
        "regex": lambda: regex_source(form.value),
        "grammar": lambda: grammar_source(form.value),
        "choice": lambda: choice_source(form.value),
        "structural_tag": lambda: structural_tag_source(form.value),
    }
    return make[form.kind]()


def _forms(guided: Guided) -> Iterator[tuple[str, Form]]:
    """The name of each field that requires a form, and that form."""
    if (form := _of_response_format(guided.response_format)) is not None:
        yield "response_format", form
    for name, kind in _FIELDS:
        if (value := getattr(guided, name)) not in (None, ""):
            yield name, Form(kind, value)
    if guided.structured_outputs is not None:
        yield from _of_structured_outputs(guided.structured_outputs)


def _of_response_format(given: ResponseFormat | None) -> Form | None:
    if isinstance(given, JsonObjectFormat):
        return Form("json_object") if given.schema_ is None else Form("json_schema", given.schema_)
    if isinstance(given, JsonSchemaFormat):
        schema = given.json_schema.schema_ if given.json_schema is not None else given.schema_
        return Form("json_object") if schema is None else Form("json_schema", schema)
    return Form("structural_tag", given.tag) if isinstance(given, StructuralTagFormat) else None


def _of_structured_outputs(given: StructuredOutputs) -> Iterator[tuple[str, Form]]:
    if given.json_object:
        yield "structured_outputs.json_object", Form("json_object")
    for name, kind in _OF_STRUCTURED_OUTPUTS:
        if (value := getattr(given, name)) is not None:
            yield f"structured_outputs.{name.rstrip('_')}", Form(kind, value)
