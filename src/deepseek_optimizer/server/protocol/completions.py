"""/v1/completions."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from ...engine.request import MAX_LOGPROBS
from .base import TOKEN_ID, ModelName, ResponseModel, Usage
from .chat import StreamOptions
from .formats import Guided
from .sampling import Sampling

_Text = Annotated[str, Field(min_length=1)]
_Ids = Annotated[list[TOKEN_ID], Field(min_length=1, fail_fast=True)]
MAX_PROMPTS = 64
Prompt = (
    _Text
    | _Ids
    | Annotated[list[_Text], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True)]
    | Annotated[list[_Ids], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True)]
)


class CompletionRequest(Sampling, Guided):
    """A text to continue without a chat template. Control tokens in it are recognized."""

    model: ModelName = None
    prompt: Prompt
    best_of: Annotated[int, Field(ge=1, le=32)] | None = Field(None, description="Must equal n: all answers are returned.")
    echo: bool | None = Field(None, description="Return the prompt before the text; not supported with logprobs.")
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    suffix: str | None = Field(None, description="Text after the completion, for models trained to fill in the middle.")
    stream_options: StreamOptions | None = Field(None, description="Requires stream.")
    add_special_tokens: bool | None = Field(
        None, description="Whether the tokenizer adds special tokens, such as a begin token."
    )


class CompletionLogprobs(ResponseModel):
    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]] | None
    text_offset: list[int]


class CompletionChoice(ResponseModel):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Literal["stop", "length"]
    stop_reason: str | int | None = None


class Completion(ResponseModel):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage


EXAMPLE: dict[str, Any] = {"prompt": "Once upon a time", "max_tokens": 16}
