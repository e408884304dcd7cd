"""Requests of Ollama's API. Options of memory, threads and layers are ignored: the server's own settings choose them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, ValidationInfo, field_validator, model_validator

from ..base import Body, Ignored, ModelName
from ..by_quality import ByQuality
from ..messages import _Name
from ..sampling import _Penalty, _Stop, _Unit

_MAX = (1 << 31) - 1
_Text = Annotated[str, Field(min_length=1)]


class Options(ByQuality):
    """Parameters of a model. Omitted ones have this server's defaults, not Ollama's; others, such as num_ctx, are ignored."""

    model_config = ConfigDict(extra="ignore")

    num_predict: Annotated[int, Field(ge=-2, le=_MAX)] | None = Field(
        None, description="Maximum number of new tokens; below 1: no limit."
    )
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=_MAX)] | None = None
    top_p: _Unit | None = Field(None, description="0: as 1.")
    min_p: _Unit | None = None
    typical_p: Annotated[float, Field(gt=0, le=1)] | None = None
    repeat_penalty: Annotated[float, Field(gt=0, le=100)] | None = None
    repeat_last_n: Annotated[int, Field(ge=-1, le=_MAX)] | None = Field(None, description="-1: the whole prompt and text.")
    presence_penalty: _Penalty | None = None
    frequency_penalty: _Penalty | None = None
    seed: Annotated[int, Field(ge=-1, le=(1 << 63) - 1)] | None = Field(None, description="-1: random.")
    stop: _Stop | Annotated[list[_Stop], Field(max_length=16)] | None = None


class _Model(Body):
    model: ModelName = None


class _Request(_Model):
    keep_alive: Ignored


class _Generation(_Request):
    options: Options | None = None
    stream: bool | None = Field(None, description="The default is true.")
    format: Literal["", "json"] | dict[str, Any] | None = Field(None, description='"json", or a JSON schema.')
    think: bool | Literal["low", "medium", "high", "max"] | None = None
    logprobs: Ignored
    top_logprobs: Ignored
    truncate: Ignored
    shift: Ignored


# Pictures in base64, for models that see.
_Images = Annotated[list[Annotated[str, Field(min_length=1)]], Field(max_length=1000, fail_fast=True)]


class OllamaFunction(Body):
    name: Annotated[str, Field(min_length=1, max_length=256)]
    arguments: dict[str, Any] = Field(default_factory=dict)
    description: Ignored
    index: Ignored


class OllamaToolCall(Body):
    """An earlier tool call of the model."""

    id: Annotated[str, Field(max_length=256)] | None = None
    type: Ignored
    function: OllamaFunction


class Message(Body):
    role: Literal["system", "user", "assistant", "tool"]
    content: str | None = None
    thinking: str | None = None
    tool_calls: Annotated[list[OllamaToolCall], Field(max_length=128, fail_fast=True)] | None = None
    tool_name: Annotated[str, Field(max_length=256)] | None = None
    tool_call_id: Annotated[str, Field(max_length=256)] | None = None
    images: _Images | None = Field(None, description="Of a user's message: pictures in base64, for models that see.")

    @model_validator(mode="after")
    def _images_of_users(self) -> Message:
        if self.images and self.role != "user":
            raise ValueError("images: only messages of the user may have images")
        return self


class ToolFunction(Body):
    name: _Name
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: Ignored


class OllamaTool(Body):
    type: Literal["function"] | None = None
    function: ToolFunction


class OllamaChatRequest(_Generation):
    """A chat to continue; without messages: whether the model is loaded."""

    messages: Annotated[list[Message], Field(max_length=10_000, fail_fast=True)] | None = None
    tools: Annotated[list[OllamaTool], Field(max_length=128, fail_fast=True)] | None = None


class OllamaGenerateRequest(_Generation):
    """A prompt to answer, as the user's message of a chat; with `raw`: a text to continue."""

    prompt: str | None = None
    system: str | None = None
    suffix: str | None = Field(None, description="Text after the completion, for models trained to fill in the middle.")
    raw: bool | None = None
    images: _Images | None = Field(None, description="Pictures in base64, for models that see.")
    template: None = Field(None, description="Not supported: the model's chat template is used.")
    context: None = Field(None, description="Not supported: use /api/chat for conversations.")

    @field_validator("template", "context", mode="before")
    @classmethod
    def _not_supported(cls, value: Any, info: ValidationInfo) -> None:
        if value:
            instead = {"template": "the model's chat template is used", "context": "use /api/chat for conversations"}
            raise ValueError(f"is not supported; {instead[str(info.field_name)]}")

    @model_validator(mode="after")
    def _images_of_chats(self) -> OllamaGenerateRequest:
        if self.images and (self.raw or self.suffix is not None):
            raise ValueError("images: not with raw or suffix, which continue a text; leave them out")
        return self


class OllamaEmbedRequest(_Request):
    input: str | Annotated[list[_Text], Field(min_length=1, max_length=64, fail_fast=True)]
    truncate: bool | None = Field(None, description="Whether texts longer than the context are cut; the default is true.")
    options: Ignored
    dimensions: Annotated[int, Field(ge=1, le=1 << 20)] | None = None


class OllamaEmbeddingsRequest(_Request):
    """The older form of `OllamaEmbedRequest`."""

    prompt: str
    options: Ignored


class OllamaShowRequest(_Model):
    name: ModelName = Field(None, description="Older name of model.")
    verbose: bool | None = None
    system: Ignored
    template: Ignored
    options: Ignored


class OllamaPullRequest(_Model):
    name: ModelName = Field(None, description="Older name of model.")
    stream: bool | None = Field(None, description="Answer with lines of JSON, which is the default.")
    insecure: Ignored


EXAMPLE_CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "Hello"}], "options": {"num_predict": 16}}
EXAMPLE_GENERATE: dict[str, Any] = {"prompt": "Hello", "options": {"num_predict": 16}}
EXAMPLE_EMBED: dict[str, Any] = {"input": "Hello"}
EXAMPLE_EMBEDDINGS: dict[str, Any] = {"prompt": "Hello"}
EXAMPLE_SHOW: dict[str, Any] = {}
EXAMPLE_PULL: dict[str, Any] = {"stream": False}
