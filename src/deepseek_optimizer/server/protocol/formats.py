"""Constraints on the text of an answer: JSON, a JSON schema, a regular expression, a grammar, choices or a structural tag, in
the fields of OpenAI's API and of other servers."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from .base import Body, Ignored

_Pattern = Annotated[str, Field(min_length=1, max_length=16_384)]
_Grammar = Annotated[str, Field(min_length=1, max_length=65_536)]
_Choices = Annotated[
    list[Annotated[str, Field(min_length=1, max_length=4096)]], Field(min_length=1, max_length=1000, fail_fast=True)
]
_Json = dict[str, Any] | Annotated[str, Field(min_length=1, max_length=1 << 18)]


class TextFormat(Body):
    type: Literal["text"]


class JsonObjectFormat(Body):
    type: Literal["json_object"]
    schema_: dict[str, Any] | None = Field(None, alias="schema", description="As in llama-server: the schema of the object.")


class JsonSchema(Body):
    name: Annotated[str, Field(min_length=1, max_length=64)] | None = None
    description: str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = Field(None, description="Ignored: the schema is always enforced.")


class JsonSchemaFormat(Body):
    type: Literal["json_schema"]
    json_schema: JsonSchema | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema", description="As in llama-server, in place of json_schema.")

    @model_validator(mode="after")
    def _one(self) -> JsonSchemaFormat:
        if (self.json_schema is None) == (self.schema_ is None):
            raise ValueError("give json_schema, with the schema in it")
        return self


class StructuralTagFormat(Body):
    """Text of which parts have given formats: xgrammar's structural tags, as in vLLM and SGLang."""

    type: Literal["structural_tag"]
    format: dict[str, Any] | None = None
    structures: Annotated[list[dict[str, Any]], Field(max_length=128)] | None = Field(
        None, description="Older form: objects with begin, schema and end; requires triggers."
    )
    triggers: Annotated[list[Annotated[str, Field(max_length=1024)]], Field(max_length=128)] | None = None

    @model_validator(mode="after")
    def _one(self) -> StructuralTagFormat:
        if (self.format is None) == (self.structures is None):
            raise ValueError("give either format, or structures and triggers")
        return self

    @property
    def tag(self) -> dict[str, Any]:
        """The structural tag."""
        return self.model_dump(exclude_none=True, exclude={"type"})


ResponseFormat = Annotated[TextFormat | JsonObjectFormat | JsonSchemaFormat | StructuralTagFormat, Field(discriminator="type")]


class StructuredOutputs(Body):
    """vLLM's field for all constraints; one of them must be given."""

    json_: _Json | None = Field(None, alias="json", description="A JSON schema, or its text.")
    regex: _Pattern | None = None
    choice: _Choices | None = None
    grammar: _Grammar | None = None
    json_object: bool | None = None
    structural_tag: _Json | None = Field(None, description="A structural tag, or its JSON text.")
    disable_any_whitespace: Ignored
    disable_additional_properties: Ignored
    whitespace_pattern: Ignored

    @model_validator(mode="after")
    def _any(self) -> StructuredOutputs:
        given = (self.json_, self.regex, self.choice, self.grammar, self.json_object or None, self.structural_tag)
        if all(value is None for value in given):
            raise ValueError("give one of json, regex, choice, grammar, json_object, structural_tag")
        return self


class Guided(Body):
    """`response_format`, and other servers' fields for the form of the text, of which a request may have one. Grammars are in
    GBNF with a rule `root`, or in Lark's notation with a rule `start`."""

    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: _Json | None = Field(None, description="vLLM's: a JSON schema, or its text.")
    guided_regex: _Pattern | None = None
    guided_choice: _Choices | None = Field(None, description="vLLM's: the text is one of these.")
    guided_grammar: _Grammar | None = None
    guided_decoding_backend: Ignored
    guided_whitespace_pattern: Ignored
    json_schema: dict[str, Any] | None = Field(None, description="llama-server's: a JSON schema.")
    grammar: Annotated[str, Field(max_length=65_536)] | None = Field(None, description="llama-server's: a grammar in GBNF.")
    regex: _Pattern | None = Field(None, description="SGLang's.")
    ebnf: _Grammar | None = Field(None, description="SGLang's.")
