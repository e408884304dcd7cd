"""Messages and tools of a chat. Messages contain text, documents, and pictures for models that see. Audio is not supported."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import AliasChoices, Discriminator, Field, Tag, model_validator

from .base import Body, Ignored

_Name = Annotated[str, Field(pattern="^[a-zA-Z0-9_.-]{1,64}$")]
_Object = dict[str, Any]
_MAX_MESSAGES = 10_000


def only_text(value: Any) -> Any:
    """Raises a clear error for types of parts that are not supported here."""
    kind = value.get("type") if isinstance(value, dict) else None
    if kind in ("image_url", "input_image", "input_audio", "file", "input_file", "video_url", "audio_url"):
        raise ValueError(f"parts of type {kind!r} are not supported here: use text, or files and pictures in user messages")
    return value


class TextPart(Body):
    """A part of a message's content."""

    type: Literal["text"]
    text: str

    _check = model_validator(mode="before")(only_text)


class FileSource(Body):
    """A file that was uploaded to /v1/files, or one in the request: `file_data` is data:...;base64,... or base64."""

    file_id: Annotated[str, Field(min_length=1, max_length=256)] | None = None
    file_data: Annotated[str, Field(min_length=1)] | None = None
    filename: Annotated[str, Field(max_length=4096)] | None = None

    @model_validator(mode="after")
    def _one(self) -> FileSource:
        if (self.file_id is None) == (self.file_data is None):
            raise ValueError("give either file_id, or file_data and filename")
        return self


class FilePart(Body):
    """A document that the message refers to: PDF, Word, HTML, Markdown, source code, any text."""

    type: Literal["file"]
    file: FileSource


class PictureUrl(Body):
    """A picture: data:...;base64,... or its address, for servers that fetch pictures (--allowed-media-domains)."""

    url: Annotated[str, Field(min_length=1)]
    detail: Ignored


class PicturePart(Body):
    """A picture: PNG, JPEG, WebP, GIF, BMP or TIFF. Only for models that see."""

    type: Literal["image_url"]
    image_url: PictureUrl


def _known_part(value: Any) -> str | None:
    """Tag of a part of a user message; what is not a file or a picture is validated as text."""
    kind = value.get("type") if isinstance(value, dict) else getattr(value, "type", None)
    return kind if kind in ("file", "image_url") else "text"


UserPart = Annotated[
    Annotated[TextPart, Tag("text")] | Annotated[FilePart, Tag("file")] | Annotated[PicturePart, Tag("image_url")],
    Discriminator(_known_part),
]
Content = str | Annotated[list[TextPart], Field(min_length=1, max_length=1000, fail_fast=True)]
UserContent = str | Annotated[list[UserPart], Field(min_length=1, max_length=1000, fail_fast=True)]


class FunctionCall(Body):
    name: Annotated[str, Field(min_length=1, max_length=256)]
    arguments: str


class ToolCall(Body):
    """An earlier tool call of the model."""

    id: Annotated[str, Field(max_length=256)]
    type: Literal["function"] = "function"
    function: FunctionCall
    index: Ignored


class _Message(Body):
    name: Annotated[str, Field(max_length=256)] | None = None
    pinned: bool | None = Field(None, description="If the server has a cache window: never drop this message from it.")


class SystemMessage(_Message):
    role: Literal["system", "developer"]
    content: Content


class UserMessage(_Message):
    role: Literal["user"]
    content: UserContent


class AssistantMessage(_Message):
    """An earlier answer of the model, as the client received it."""

    role: Literal["assistant"]
    content: Content | None = None
    reasoning_content: str | None = Field(None, validation_alias=AliasChoices("reasoning_content", "reasoning"))
    tool_calls: Annotated[list[ToolCall], Field(max_length=128, fail_fast=True)] | None = None
    refusal: Ignored
    annotations: Ignored
    audio: Ignored
    function_call: FunctionCall | None = Field(None, description="Older form of tool_calls.")


class ToolMessage(_Message):
    """The result of a tool call."""

    role: Literal["tool"]
    content: Content | None
    tool_call_id: Annotated[str, Field(max_length=256)]


class FunctionMessage(_Message):
    """The result of a function call, in the older form."""

    role: Literal["function"]
    content: Content | None


Message = Annotated[SystemMessage | UserMessage | AssistantMessage | ToolMessage | FunctionMessage, Field(discriminator="role")]
Messages = Annotated[list[Message], Field(min_length=1, max_length=_MAX_MESSAGES, fail_fast=True)]


def continues(messages: Sequence[Mapping[str, Any]]) -> bool:
    """Whether a chat ends with the beginning of an answer, which protocols other than OpenAI's continue.

    Args:
        messages: in OpenAI's format.
    """
    last = messages[-1] if messages else {}
    return last.get("role") == "assistant" and bool(last.get("content")) and not last.get("tool_calls")


class Function(Body):
    name: _Name
    description: str | None = None
    parameters: _Object | None = Field(None, description="JSON schema of the arguments, which are an object.")
    strict: bool | None = None


class Tool(Body):
    type: Literal["function"]
    function: Function


Functions = Annotated[list[Function], Field(min_length=1, max_length=128, fail_fast=True)]
Tools = Annotated[list[Tool], Field(max_length=128, fail_fast=True)]


class NamedFunction(Body):
    name: Annotated[str, Field(max_length=64)]


class NamedTool(Body):
    """The tool that must be called."""

    type: Literal["function"]
    function: NamedFunction


class AllowedTools(Body):
    mode: Literal["auto", "required"]
    tools: Annotated[list[NamedTool], Field(min_length=1, max_length=128, fail_fast=True)]


class AllowedToolsChoice(Body):
    """The tools that may be called."""

    type: Literal["allowed_tools"]
    allowed_tools: AllowedTools


ToolChoice = Literal["none", "auto", "required"] | NamedTool | AllowedToolsChoice
