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
    max_body_bytes: int = Field(description="Maximum size of a request.")
    max_pictures: int = Field(description="Maximum number of pictures in a request; 0: the model reads text only.")
    default_sampling: DefaultSampling = Field(description="Used for fields that a request omits.")
    root: str = Field(description="The model itself; for a LoRA adapter: its directory.")
    parent: str | None = Field(description="For a LoRA adapter: the model that it changes.")


class ModelList(ResponseModel):
    object: Literal["list"]
    data: list[ModelCard]


class ModelStatus(ResponseModel):
    value: Literal["unloaded", "loading", "loaded", "unloading", "failed"]
    failed: bool
    pinned: bool
    reason: str | None = Field(None, description="Why the model could not be loaded.")


class PooledModelCard(ResponseModel):
    """A model of a server with several. Fields that are known only of a loaded model are missing otherwise."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int | None
    status: ModelStatus
    size_bytes: int | None = Field(description="Size of its weights in files.")
    memory_bytes: int | None = Field(description="Memory of its weights, and the maximum of its cache.")
    max_file_bytes: int | None = None
    max_body_bytes: int | None = None
    max_pictures: int | None = None
    default_sampling: DefaultSampling | None = None


class PooledModelList(ResponseModel):
    object: Literal["list"]
    data: list[PooledModelCard]


class ModelNameRequest(Body):
    model: Annotated[str, Field(min_length=1, max_length=1024)]


class Done(ResponseModel):
    success: bool


class TokenizeRequest(Body):
    """A text (`prompt`), or a chat (`messages`), to which the chat template is applied."""

    model: ModelName = None
    prompt: str | None = None
    messages: Messages | None = None
    tools: Tools | None = None
    chat_template_kwargs: Annotated[dict[str, _Scalar], Field(max_length=16)] | None = None
    add_special_tokens: bool | None = Field(None, description="For a text: whether the tokenizer adds special tokens.")
    add_generation_prompt: bool | None = Field(None, description="For a chat: append the start of an answer; the default.")
    continue_final_message: bool | None = Field(None, description="For a chat: the last message is continued.")
    return_token_strs: bool | None = Field(None, description="Return each token as the vocabulary writes it.")
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


EXAMPLE_MODEL_NAME: dict[str, Any] = {"model": "a-model"}
EXAMPLE_TOKENIZE: dict[str, Any] = {"prompt": "Hello"}
EXAMPLE_DETOKENIZE: dict[str, Any] = {"tokens": [1]}
