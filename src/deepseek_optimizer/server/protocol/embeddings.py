"""/v1/embeddings, and llama-server's /embedding."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from .base import TOKEN_ID, IgnoredFields, ModelName, ResponseModel
from .prompt_parts import MixedPrompt, PromptObject
from .sampling import Priority

MAX_INPUTS = 2048  # OpenAI's limit
_Text = Annotated[str, Field(min_length=1)]
_Ids = Annotated[list[TOKEN_ID], Field(min_length=1, fail_fast=True)]
Inputs = (
    _Text
    | _Ids
    | Annotated[list[_Text], Field(min_length=1, max_length=MAX_INPUTS, fail_fast=True)]
    | Annotated[list[_Ids], Field(min_length=1, max_length=MAX_INPUTS, fail_fast=True)]
    | PromptObject  # and the following, as llama-server
    | MixedPrompt
    | Annotated[list[_Text | PromptObject | MixedPrompt], Field(min_length=1, max_length=MAX_INPUTS, fail_fast=True)]
)
Name = Annotated[str, Field(max_length=64)]


class Truncated(IgnoredFields):
    """Fields of all requests that read texts without generating any; the names are vLLM's."""

    model: ModelName = None
    truncate_prompt_tokens: Annotated[int, Field(ge=-1, le=(1 << 31) - 1)] | None = Field(
        None,
        description="Shorten longer texts to this number of tokens; -1: the model's context. By default they are an error.",
    )
    truncation_side: Literal["left", "right"] | None = Field(None, description="Which end of a longer text is dropped.")
    priority: Priority = None


class Embeds(Truncated):
    """Fields of requests for vectors."""

    encoding_format: Literal["float", "base64"] | None = Field(None, description="base64: encodes little-endian float32.")
    dimensions: Annotated[int, Field(ge=1, le=1 << 20)] | None = Field(
        None, description="Keep this number of leading elements; for models trained for it (Matryoshka embeddings)."
    )
    normalize: bool | None = Field(None, description="Whether vectors have length 1, which is the default.")
    use_activation: bool | None = Field(None, description="vLLM's name of `normalize`.")
    embd_normalize: Annotated[int, Field(ge=-1, le=64)] | None = Field(
        None, description="llama-server's: -1 no normalization, 0 the largest magnitude becomes 32760, p the p-norm becomes 1."
    )
    add_special_tokens: bool | None = Field(None, description="Whether the tokenizer adds special tokens; the default is true.")
    input_type: Name | None = Field(
        None,
        description='What the texts are, such as "query" or "document": chooses the model\'s prompt for it, if it has one.',
    )
    prompt_name: Name | None = Field(None, description="Name of one of the model's prompts, to put before each text.")


class EmbeddingRequest(Embeds):
    """Texts, or their token ids, to embed. A list with token ids at its top level is one text, of which other parts may be
    strings; a text may also be an object with `prompt_string`, or `content` as a list of text parts."""

    input: Inputs


class NativeEmbeddingRequest(Embeds):
    """Texts to embed in llama-server's format: `content` has the forms of `input` in /v1/embeddings."""

    content: Inputs
    encoding_format: Literal["float"] | None = None  # only numbers


class NativeEmbedding(ResponseModel):
    index: int
    embedding: list[list[float]]


class Embedding(ResponseModel):
    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class PromptUsage(ResponseModel):
    prompt_tokens: int
    completion_tokens: Literal[0] | None = None
    total_tokens: int


class EmbeddingList(ResponseModel):
    id: str
    object: Literal["list"]
    created: int
    data: list[Embedding]
    model: str
    usage: PromptUsage


EXAMPLE: dict[str, Any] = {"input": "Hello"}
EXAMPLE_NATIVE: dict[str, Any] = {"content": "Hello"}
