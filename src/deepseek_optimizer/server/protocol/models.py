"""/v1/models, /tokenize, /detokenize, /health and /ready."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field

from .base import TOKEN_ID, Body, ModelName, ResponseModel
from .chat import _Scalar
from .messages import Messages, Tools


class DefaultSampling(ResponseModel):
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    max_tokens: int


class ModelCard(ResponseModel):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int
    max_file_bytes: int = Field(description="Maximum size of a file uploaded to /v1/files.")
    default_sampling: DefaultSampling = Field(description="Used for fields that a request omits.")
    parent: str | None = Field(None, description="For a LoRA adapter: the model that it changes.")


class ModelList(ResponseModel):
    object: Literal["list"]
    data: list[ModelCard]


class TokenizeRequest(Body):
    """A text (`prompt`), or a chat (`messages`), to which the chat template is applied."""

    model: ModelName = None
    prompt: str | None = None
    messages: Messages | None = None
    tools: Tools | None = None
    chat_template_kwargs: Annotated[dict[str, _Scalar], Field(max_length=16)] | None = None
    add_special_tokens: bool | None = Field(None, description="For a text: whether the tokenizer adds special tokens.")
    return_token_strs: bool | None = None
    content: str | None = Field(None, description="A text, in llama-server's form of the request.")
    add_special: bool | None = Field(None, description="With content: add special tokens; the default is false.")
    parse_special: bool | None = Field(None, description="With content: recognize control tokens; the default is true.")
    with_pieces: bool | None = Field(None, description="With content: return each token with its text.")


class Tokens(ResponseModel):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class TokenizerInfo(ResponseModel):
    """The settings of a tokenizer: the fields below and others of its tokenizer_config.json."""

    model_config = ConfigDict(extra="allow")

    tokenizer_class: str
    chat_template: str | list[dict[str, str]] | dict[str, str] | None = None


class TokenPiece(ResponseModel):
    """A token with its text, or with its bytes if they are not text."""

    id: int
    piece: str | list[int]


class NativeTokens(ResponseModel):
    """The answer to `content`, in llama-server's form."""

    tokens: list[int] | list[TokenPiece]


class DetokenizeRequest(Body):
    model: ModelName = None
    tokens: Annotated[list[TOKEN_ID], Field(max_length=1_000_000, fail_fast=True)]


class Text(ResponseModel):
    """A text, under vLLM's name and llama-server's."""

    prompt: str
    content: str


class Status(ResponseModel):
    status: str


EXAMPLE_TOKENIZE: dict[str, Any] = {"prompt": "Hello"}
EXAMPLE_DETOKENIZE: dict[str, Any] = {"tokens": [1]}
