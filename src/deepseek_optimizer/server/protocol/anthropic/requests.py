"""Requests of Anthropic's Messages API. Text is read and, by models that see, images; documents and Anthropic's own tools are
errors."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from ..base import Body, Ignored, ModelName
from ..by_quality import ByQuality
from ..messages import _Name
from ..sampling import _Stop, _Tokens

_Id = Annotated[str, Field(min_length=1, max_length=256)]
_MAX_BLOCKS = 1000


def _readable(value: Any) -> Any:
    """Raises a clear error for blocks that are not supported here."""
    kind = value.get("type") if isinstance(value, dict) else None
    if kind in ("document", "search_result", "container_upload"):
        raise ValueError(f"blocks of type {kind!r} are not supported: this server reads text; send the content as a text block")
    if kind in ("server_tool_use", "web_search_tool_result", "mcp_tool_use", "mcp_tool_result"):
        raise ValueError(f"blocks of type {kind!r} are not supported: tools that run on Anthropic's servers do not exist here")
    return value


class _Block(Body):
    cache_control: Ignored


class TextBlock(_Block):
    type: Literal["text"]
    text: str
    citations: Ignored


class ImageData(Body):
    """An image in the request."""

    type: Literal["base64"]
    media_type: Annotated[str, Field(pattern=r"^image/[a-z0-9.+-]{1,32}$")]
    data: Annotated[str, Field(min_length=1)]


class ImageUrl(Body):
    """The address of an image, for servers that fetch pictures (--allowed-media-domains)."""

    type: Literal["url"]
    url: Annotated[str, Field(min_length=1)]


class ImageBlock(_Block):
    """An image, for models that see."""

    type: Literal["image"]
    source: Annotated[ImageData | ImageUrl, Field(discriminator="type")]


class ThinkingBlock(_Block):
    """Earlier reasoning of the model."""

    type: Literal["thinking"]
    thinking: str
    signature: Ignored


class RedactedThinkingBlock(_Block):
    type: Literal["redacted_thinking"]
    data: Ignored


class ToolUseBlock(_Block):
    """An earlier tool call of the model."""

    type: Literal["tool_use"]
    id: _Id
    name: Annotated[str, Field(min_length=1, max_length=256)]
    input: dict[str, Any]
    caller: Ignored


def _text_only(value: Any) -> Any:
    """As `_readable`, where images are not supported either."""
    if isinstance(value, dict) and value.get("type") == "image":
        raise ValueError("blocks of type 'image' are supported in messages of the user only")
    return _readable(value)


_Text = Annotated[TextBlock, BeforeValidator(_text_only)]
Texts = str | Annotated[list[_Text], Field(max_length=_MAX_BLOCKS, fail_fast=True)]


class ToolResultBlock(_Block):
    """The result of a tool call."""

    type: Literal["tool_result"]
    tool_use_id: _Id
    content: Texts | None = None
    is_error: bool | None = None


_UserBlock = Annotated[
    Annotated[TextBlock | ImageBlock | ToolResultBlock, Field(discriminator="type")],
    BeforeValidator(_readable),
]
_AssistantBlock = Annotated[
    Annotated[TextBlock | ThinkingBlock | RedactedThinkingBlock | ToolUseBlock, Field(discriminator="type")],
    BeforeValidator(_text_only),
]


class AnthropicUserMessage(Body):
    role: Literal["user"]
    content: str | Annotated[list[_UserBlock], Field(min_length=1, max_length=_MAX_BLOCKS, fail_fast=True)]


class AnthropicAssistantMessage(Body):
    role: Literal["assistant"]
    content: str | Annotated[list[_AssistantBlock], Field(max_length=_MAX_BLOCKS, fail_fast=True)]


class AnthropicSystemMessage(Body):
    role: Literal["system"]
    content: Texts


Message = Annotated[AnthropicUserMessage | AnthropicAssistantMessage | AnthropicSystemMessage, Field(discriminator="role")]


class AnthropicTool(Body):
    """A tool that the client runs."""

    type: Literal["custom"] | None = None
    name: _Name
    description: str | None = None
    input_schema: dict[str, Any]
    cache_control: Ignored
    strict: Ignored
    defer_loading: Ignored
    eager_input_streaming: Ignored
    input_examples: Ignored
    allowed_callers: Ignored

    @model_validator(mode="before")
    @classmethod
    def _custom(cls, value: Any) -> Any:
        kind = value.get("type") if isinstance(value, dict) else None
        if isinstance(kind, str) and kind != "custom":
            raise ValueError("only tools of type 'custom' are supported: describe the tool with an input_schema")
        return value


class _Choice(Body):
    disable_parallel_tool_use: bool | None = None


class AutoChoice(_Choice):
    type: Literal["auto"]


class AnyChoice(_Choice):
    type: Literal["any"]


class NamedChoice(_Choice):
    type: Literal["tool"]
    name: Annotated[str, Field(max_length=64)]


class NoChoice(Body):
    type: Literal["none"]


Choice = Annotated[AutoChoice | AnyChoice | NamedChoice | NoChoice, Field(discriminator="type")]


class Thinking(Body):
    """Whether the model reasons before it answers. `adaptive` leaves it to the model's chat template."""

    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: _Tokens | None = Field(None, description="Chooses the reasoning effort; not a limit.")
    display: Literal["summarized", "omitted"] | None = None


class AnthropicSchemaFormat(Body):
    type: Literal["json_schema"]
    schema_: dict[str, Any] = Field(alias="schema")


class OutputConfig(Body):
    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None
    format: AnthropicSchemaFormat | None = None


class CountTokensRequest(Body):
    """A prompt whose tokens are counted."""

    model: ModelName = None
    messages: Annotated[list[Message], Field(min_length=1, max_length=10_000, fail_fast=True)]
    system: Texts | None = None
    tools: Annotated[list[AnthropicTool], Field(max_length=128, fail_fast=True)] | None = None
    tool_choice: Choice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    output_format: AnthropicSchemaFormat | None = None
    cache_control: Ignored
    context_management: Ignored
    speed: Ignored


class MessagesRequest(CountTokensRequest, ByQuality):
    """A conversation to continue."""

    max_tokens: _Tokens
    stop_sequences: Annotated[list[_Stop], Field(max_length=16)] | None = None
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0, le=(1 << 31) - 1)] | None = None
    stream: bool | None = None
    metadata: Ignored
    service_tier: Ignored
    container: Ignored
    inference_geo: Ignored


EXAMPLE: dict[str, Any] = {"max_tokens": 16, "messages": [{"role": "user", "content": "Hello"}]}
EXAMPLE_COUNT: dict[str, Any] = {"messages": [{"role": "user", "content": "Hello"}]}
