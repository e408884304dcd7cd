"""/v1/responses: OpenAI's newer protocol. A request contains the whole conversation, or continues a stored response."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, TypeAdapter, field_validator, model_validator

from ...backends.qualities import Quality
from ...engine.request import MAX_LOGPROBS
from .base import Body, Ignored, IgnoredFields, ModelName, ResponseModel
from .by_quality import ByQuality
from .chat import Effort, _Scalar
from .messages import _Name, only_text
from .sampling import MaxTokens, Priority, Seed
from .telemetry import NativeTimings, Telemetry

_Id = Annotated[str, Field(max_length=256)]
_MAX_ITEMS = 10_000


class InputText(Body):
    type: Literal["input_text", "output_text", "text"]
    text: str
    annotations: Ignored
    logprobs: Ignored

    _check = model_validator(mode="before")(only_text)


class InputFile(Body):
    """A document that the message refers to."""

    type: Literal["input_file"]
    file_id: Annotated[str, Field(min_length=1, max_length=256)] | None = None
    file_data: Annotated[str, Field(min_length=1)] | None = None
    filename: Annotated[str, Field(max_length=4096)] | None = None
    file_url: None = None
    detail: Ignored

    @field_validator("file_url", mode="before")
    @classmethod
    def _no_address(cls, value: Any) -> Any:
        if value is not None:
            raise ValueError("URLs are not fetched; send the file itself")
        return value

    @model_validator(mode="after")
    def _one(self) -> InputFile:
        if (self.file_id is None) == (self.file_data is None):
            raise ValueError("give either file_id, or file_data and filename")
        return self


class InputImage(Body):
    """A picture, for models that see: `image_url` is data:...;base64,... or, if the server fetches pictures, an address."""

    type: Literal["input_image"]
    image_url: Annotated[str, Field(min_length=1)]
    file_id: None = None
    detail: Ignored

    @model_validator(mode="before")
    @classmethod
    def _no_file(cls, value: Any) -> Any:
        if isinstance(value, dict) and value.get("file_id") is not None:
            raise ValueError("file_id: pictures cannot be uploaded; send the picture in image_url, as a data: URL")
        return value


def _known_part(value: Any) -> str | None:
    kind = value.get("type") if isinstance(value, dict) else getattr(value, "type", None)
    return {"input_file": "file", "input_image": "image"}.get(kind or "", "text")


_Part = Annotated[
    Annotated[InputText, Tag("text")] | Annotated[InputFile, Tag("file")] | Annotated[InputImage, Tag("image")],
    Discriminator(_known_part),
]
InputContent = str | Annotated[list[InputText], Field(max_length=1000, fail_fast=True)]
MessageContent = str | Annotated[list[_Part], Field(max_length=1000, fail_fast=True)]


class InputMessage(Body):
    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: MessageContent
    id: _Id | None = None
    status: Ignored
    phase: Ignored

    @model_validator(mode="after")
    def _files_of_users(self) -> InputMessage:
        if self.role != "user" and isinstance(self.content, list):
            if any(isinstance(part, (InputFile, InputImage)) for part in self.content):
                raise ValueError("only user messages may contain files and pictures")
        return self


class InputCall(Body):
    """An earlier function call of the model."""

    type: Literal["function_call"]
    call_id: _Id
    name: Annotated[str, Field(min_length=1, max_length=256)]
    arguments: str
    id: _Id | None = None
    status: Ignored


class InputCallOutput(Body):
    """The result of a function call."""

    type: Literal["function_call_output"]
    call_id: _Id
    output: InputContent
    id: _Id | None = None
    status: Ignored


class ReasoningText(Body):
    type: Literal["reasoning_text"]
    text: str


class InputReasoning(Body):
    """Earlier reasoning of the model; summaries and encrypted content are ignored."""

    type: Literal["reasoning"]
    content: list[ReasoningText] | None = None
    id: _Id | None = None
    summary: Ignored
    encrypted_content: Ignored
    status: Ignored


InputItem = Annotated[InputMessage | InputCall | InputCallOutput | InputReasoning, Field(discriminator="type")]


class FunctionTool(Body):
    type: Literal["function"]
    name: _Name
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class NamedFunctionTool(Body):
    """The function that must be called."""

    type: Literal["function"]
    name: Annotated[str, Field(max_length=64)]


class AllowedFunctionTools(Body):
    """The functions that may be called."""

    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: Annotated[list[NamedFunctionTool], Field(min_length=1, max_length=128, fail_fast=True)]


class PlainText(Body):
    type: Literal["text"]


class JsonObject(Body):
    type: Literal["json_object"]


class SchemaFormat(Body):
    type: Literal["json_schema"]
    name: Annotated[str, Field(min_length=1, max_length=64)]
    schema_: dict[str, Any] = Field(alias="schema")
    description: str | None = None
    strict: bool | None = Field(None, description="Ignored: the schema is always enforced.")


class TextOptions(Body):
    verbosity: Ignored
    format: Annotated[PlainText | JsonObject | SchemaFormat, Field(discriminator="type")] | None = None


class ReasoningOptions(Body):
    effort: Effort | None = None
    summary: Ignored
    generate_summary: Ignored


class ResponseStreamOptions(Body):
    include_obfuscation: Ignored


_Input = (
    Annotated[str, Field(min_length=1)] | Annotated[list[InputItem], Field(min_length=1, max_length=_MAX_ITEMS, fail_fast=True)]
)


class ResponsesRequest(IgnoredFields, ByQuality, Telemetry):
    """A conversation to continue: `input`, after that of a stored response."""

    model: ModelName = None
    input: _Input
    instructions: str | None = None
    max_output_tokens: MaxTokens = None
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    tools: Annotated[list[FunctionTool], Field(max_length=128, fail_fast=True)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedFunctionTool | AllowedFunctionTools | None = None
    parallel_tool_calls: bool | None = None
    text: TextOptions | None = None
    reasoning: ReasoningOptions | None = None
    include: Annotated[list[Annotated[str, Field(max_length=256)]], Field(max_length=64)] | None = Field(
        None, description="message.output_text.logprobs; other values are ignored."
    )
    stream: bool | None = None
    stream_options: ResponseStreamOptions | None = None
    truncation: Literal["disabled"] | None = None
    store: bool | None = Field(None, description="Store the response for later requests; the default is true.")
    background: bool | None = Field(None, description="Return at once; the response is generated meanwhile. Requires store.")
    previous_response_id: _Id | None = Field(None, description="The stored response that the conversation continues.")
    conversation: None = None
    prompt: None = None
    max_tool_calls: Ignored  # of tools that the server runs
    top_k: Annotated[int, Field(ge=-1, le=(1 << 31) - 1)] | None = Field(None, description="0 or -1: all.")
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    seed: Seed = None
    priority: Priority = None
    chat_template_kwargs: Annotated[dict[str, _Scalar], Field(max_length=16)] | None = None

    @field_validator("input", mode="before")
    @classmethod
    def _typed(cls, value: Any) -> Any:
        """Adds the type of messages, which may be omitted."""
        if not isinstance(value, list):
            return value
        return [{"type": "message", **item} if isinstance(item, dict) and "type" not in item else item for item in value]

    @field_validator("conversation", mode="before")
    @classmethod
    def _no_conversation(cls, value: Any) -> Any:
        if value is not None:
            raise ValueError("this server stores no conversations: use previous_response_id")
        return value


class InputTokensDetails(ResponseModel):
    cached_tokens: int
    cache_write_tokens: int


class OutputTokensDetails(ResponseModel):
    reasoning_tokens: int


class ResponseUsage(ResponseModel):
    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    output_tokens_details: OutputTokensDetails
    total_tokens: int
    quality: Quality | None = None


class IncompleteDetails(ResponseModel):
    reason: Literal["max_output_tokens"]


class ResponseObject(ResponseModel):
    """A response. `output` contains reasoning, messages and function calls in OpenAI's format."""

    id: str
    object: Literal["response"]
    created_at: int
    status: Literal["completed", "incomplete", "in_progress", "queued", "cancelled", "failed"]
    error: dict[str, str] | None
    incomplete_details: IncompleteDetails | None
    instructions: str | None
    max_output_tokens: int | None
    model: str
    output: list[dict[str, Any]]
    parallel_tool_calls: bool
    background: bool
    previous_response_id: str | None
    store: bool
    temperature: float | None
    text: dict[str, Any]
    tool_choice: str | dict[str, Any]
    tools: list[dict[str, Any]]
    top_p: float | None
    truncation: Literal["disabled"]
    usage: ResponseUsage | None
    document: dict[str, Any] | None = Field(
        None, description="How the answer was obtained from files: strategy, reason, notes."
    )
    timings: NativeTimings | None = None


class DeletedResponse(ResponseModel):
    id: str
    object: Literal["response"]
    deleted: Literal[True]


class InputItemList(ResponseModel):
    """Input items of a response, newest first unless `order` is asc."""

    object: Literal["list"]
    data: list[dict[str, Any]]
    first_id: str | None
    last_id: str | None
    has_more: bool


InputItems = TypeAdapter(Annotated[list[InputItem], Field(max_length=_MAX_ITEMS, fail_fast=True)])

EXAMPLE: dict[str, Any] = {"input": "Hello", "max_output_tokens": 16}
