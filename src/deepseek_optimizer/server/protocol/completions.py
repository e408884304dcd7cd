"""/v1/completions."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from ...engine.request import MAX_LOGPROBS
from .base import TOKEN_ID, ModelName, ResponseModel, Usage
from .chat import StreamOptions
from .formats import Guided
from .reports import PromptLogprobList
from .sampling import MaxTokensOrZero, Sampling
from .telemetry import NativeTimings

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
    max_tokens: MaxTokensOrZero = Field(
        None,
        description="Maximum number of new tokens; the default is 16. 0: only process the prompt.",
    )
    best_of: Annotated[int, Field(ge=1, le=32)] | None = Field(
        None, description="Generate this many answers, and return the n with the highest mean log probability of a token."
    )
    truncate_prompt_tokens: Literal[-1] | Annotated[int, Field(ge=1, le=(1 << 31) - 1)] | None = Field(
        None,
        description="Shorten longer prompts to this number of tokens; -1: what the context has room for besides max_tokens. By "
        "default they are an error.",
    )
    truncation_side: Literal["left", "right"] | None = Field(
        None, description="Which end of a longer prompt is dropped; the default is left."
    )
    echo: bool | None = Field(None, description="Return the prompt before the text; with logprobs, also those of its tokens.")
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    suffix: str | None = Field(None, description="Text after the completion, for models trained to fill in the middle.")
    stream_options: StreamOptions | None = Field(None, description="Requires stream.")
    add_special_tokens: bool | None = Field(
        None, description="Whether the tokenizer adds special tokens, such as a begin token."
    )


class CompletionLogprobs(ResponseModel):
    tokens: list[str]
    token_logprobs: list[float | None] = Field(description="Null for the first token of a prompt.")
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(ResponseModel):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Literal["stop", "length"]
    stop_reason: str | int | None = None
    prompt_logprobs: PromptLogprobList | None = None
    prompt_token_ids: list[int] | None = None
    token_ids: list[int] | None = None


class Completion(ResponseModel):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[CompletionChoice]
    usage: Usage
    timings: NativeTimings | None = None


EXAMPLE: dict[str, Any] = {"prompt": "Once upon a time", "max_tokens": 16}
