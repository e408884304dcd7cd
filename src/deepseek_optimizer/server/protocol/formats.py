"""Constraints on the text of an answer: JSON, a JSON schema, a regular expression or a grammar."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from .base import Body


class TextFormat(Body):
    type: Literal["text"]


class JsonObjectFormat(Body):
    type: Literal["json_object"]


class JsonSchema(Body):
    name: Annotated[str, Field(min_length=1, max_length=64)]
    description: str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = Field(None, description="Ignored: the schema is always enforced.")


class JsonSchemaFormat(Body):
    type: Literal["json_schema"]
    json_schema: JsonSchema


ResponseFormat = Annotated[TextFormat | JsonObjectFormat | JsonSchemaFormat, Field(discriminator="type")]


class Guided(Body):
    """`response_format`, and vLLM's fields for a regular expression and an EBNF grammar (GBNF, with a rule `root`)."""

    response_format: ResponseFormat | None = None
    guided_regex: Annotated[str, Field(min_length=1, max_length=16_384)] | None = None
    guided_grammar: Annotated[str, Field(min_length=1, max_length=65_536)] | None = None
