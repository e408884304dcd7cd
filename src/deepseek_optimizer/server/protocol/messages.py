"""A chat's messages and tools. Text only: no image, sound or file is read, and no address in a request is ever fetched."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from .base import Body, Ignored

_Name = Annotated[str, Field(pattern="^[a-zA-Z0-9_.-]{1,64}$")]
_Object = dict[str, Any]
_MOST_MESSAGES = 10_000


def only_text(value: Any) -> Any:
    """A clear word about parts that can't be read."""
    kind = value.get("type") if isinstance(value, dict) else None
    if kind in ("image_url", "input_image", "input_audio", "file", "input_file", "video_url", "audio_url"):
        raise ValueError(f"parts of type {kind!r} are not read: this server takes text only, and fetches nothing")
    return value


class TextPart(Body):
    """A part of a message's content."""

    type: Literal["text"]
    text: str

    _check = model_validator(mode="before")(only_text)


Content = str | Annotated[list[TextPart], Field(min_length=1, max_length=1000)]


class FunctionCall(Body):
    name: Annotated[str, Field(min_length=1, max_length=256)]
    arguments: str


class ToolCall(Body):
    """A call that the model made earlier."""

    id: Annotated[str, Field(max_length=256)]
    type: Literal["function"] = "function"
    function: FunctionCall
    index: Ignored


class _Message(Body):
    name: Annotated[str, Field(max_length=256)] | None = None
    pinned: bool | None = Field(None, description="Where the server has a window: this message is never left out of it.")


class SystemMessage(_Message):
    role: Literal["system", "developer"]
    content: Content


class UserMessage(_Message):
    role: Literal["user"]
    content: Content


class AssistantMessage(_Message):
    """What the model said earlier; clients send it back as they got it."""

    role: Literal["assistant"]
    content: Content | None = None
    reasoning_content: str | None = None
    tool_calls: Annotated[list[ToolCall], Field(max_length=128)] | None = None
    refusal: Ignored
    annotations: Ignored
    audio: Ignored
    function_call: None = None


class ToolMessage(_Message):
    """What a tool answered."""

    role: Literal["tool"]
    content: Content
    tool_call_id: Annotated[str, Field(max_length=256)]


Message = Annotated[SystemMessage | UserMessage | AssistantMessage | ToolMessage, Field(discriminator="role")]
Messages = Annotated[list[Message], Field(min_length=1, max_length=_MOST_MESSAGES)]


class Function(Body):
    name: _Name
    description: str | None = None
    parameters: _Object | None = Field(None, description="JSON schema of the arguments, an object.")
    strict: bool | None = None


class Tool(Body):
    type: Literal["function"]
    function: Function


Tools = Annotated[list[Tool], Field(max_length=128)]


class NamedFunction(Body):
    name: Annotated[str, Field(max_length=64)]


class NamedTool(Body):
    """The tool that must be called."""

    type: Literal["function"]
    function: NamedFunction


ToolChoice = Literal["none", "auto", "required"] | NamedTool


def plain(messages: list[Message]) -> list[dict[str, Any]]:
    """As chat templates take them: content a string, fields that are null left out."""
    found = []
    for message in messages:
        values = message.model_dump(exclude_none=True, exclude={"refusal", "annotations", "audio", "function_call"})
        for call in values.get("tool_calls", ()):
            call.pop("index", None)
        if isinstance(content := values.get("content"), list):
            values["content"] = "".join(part["text"] for part in content)
        values.setdefault("content", "")
        if values["role"] == "developer":
            values["role"] = "system"
        found.append(values)
    return found
