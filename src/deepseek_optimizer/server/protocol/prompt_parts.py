"""Prompts as llama-server takes them: a text, token ids, both mixed, or an object."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, field_validator, model_validator

from .base import TOKEN_ID, Body

Part = str | int  # a text, or a token id


def _has_token(parts: list[Part]) -> list[Part]:
    if not any(isinstance(part, int) for part in parts):
        raise ValueError("must have token ids; otherwise it is a list of prompts")
    return parts


# One prompt of token ids and texts.
MixedPrompt = Annotated[
    list[TOKEN_ID | Annotated[str, Field(min_length=1)]],
    Field(min_length=1, max_length=1_000_000, fail_fast=True),
    AfterValidator(_has_token),
]


class TextOfPrompt(Body):
    """A part of an object's content."""

    type: Literal["text"]
    text: str


class PromptObject(Body):
    """A text in an object: `prompt_string`, or `content` as a list of parts, which are joined."""

    prompt_string: str | None = None
    content: Annotated[list[TextOfPrompt], Field(min_length=1, max_length=1000, fail_fast=True)] | None = None
    multimodal_data: None = Field(None, description="Not supported: images and audio.")

    @field_validator("multimodal_data", mode="before")
    @classmethod
    def _only_text(cls, value: Any) -> Any:
        if value not in (None, "", []):
            raise ValueError("image input is not supported, nor is audio; send text only")
        return None

    @model_validator(mode="after")
    def _one(self) -> PromptObject:
        if (self.prompt_string is None) == (self.content is None):
            raise ValueError("give either prompt_string or content")
        return self

    @property
    def text(self) -> str:
        return "".join(part.text for part in self.content or ()) if self.prompt_string is None else self.prompt_string


def prompts_of(given: Any) -> tuple[list[list[Part]], bool]:
    """The prompts in a field that is one prompt or a list of them.

    Args:
        given: validated: a text, an object, a list with token ids at its top level (one prompt), or another list (several).

    Returns: the parts of each prompt, and whether the field is a list of prompts.
    """
    if isinstance(given, (str, PromptObject)):
        return [list(_parts(given))], False
    if any(isinstance(part, int) for part in given):
        return [list(_parts(given))], False
    return [list(_parts(one)) for one in given], True


def _parts(prompt: Any) -> Iterator[Part]:
    if isinstance(prompt, PromptObject):
        yield prompt.text
    elif isinstance(prompt, str):
        yield prompt
    else:
        yield from prompt
