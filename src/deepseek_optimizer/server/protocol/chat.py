"""/v1/chat/completions."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from ...engine.request import MAX_LOGPROBS
from .base import Body, Ignored, ModelName, ResponseModel, Usage
from .formats import Guided
from .messages import Functions, Messages, NamedFunction, ToolChoice, Tools
from .reports import PromptLogprobList
from .sampling import MaxTokens, Sampling
from .telemetry import NativeTimings

Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]
_Scalar = bool | int | float | Annotated[str, Field(max_length=1024)] | None


class StreamOptions(Body):
    include_usage: bool | None = Field(None, description="Send a last chunk without choices that contains the usage.")
    continuous_usage_stats: bool | None = Field(None, description="Requires include_usage: every chunk has the usage so far.")
    include_obfuscation: Ignored


def usage_in_stream(options: StreamOptions | None) -> tuple[bool, bool]:
    """Whether a stream has a last chunk with the usage, and whether every chunk has the usage so far."""
    last = options is not None and bool(options.include_usage)
    return last, last and options is not None and bool(options.continuous_usage_stats)


class ChatRequest(Sampling, Guided):
    """A chat to continue."""

    model: ModelName = None
    messages: Messages
    max_completion_tokens: MaxTokens = Field(None, description="Newer name of max_tokens.")
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = Field(None, description="Requires logprobs.")
    tools: Tools | None = None
    tool_choice: ToolChoice | None = None
    functions: Functions | None = Field(None, description="Older form of tools.")
    function_call: Literal["none", "auto"] | NamedFunction | None = Field(None, description="Older form of tool_choice.")
    parallel_tool_calls: bool | None = None
    stream_options: StreamOptions | None = Field(None, description="Requires stream.")
    reasoning_effort: Effort | None = Field(None, description="For models whose chat template supports it.")
    include_reasoning: bool | None = Field(None, description="Whether to return reasoning; the default is true.")
    chat_template_kwargs: Annotated[dict[str, _Scalar], Field(max_length=16)] | None = Field(
        None, description="Variables of the model's chat template, such as enable_thinking."
    )
    add_generation_prompt: bool | None = Field(None, description="Append the start of an answer to the prompt; the default.")
    continue_final_message: bool | None = Field(None, description="The last message, by the assistant, is continued.")
    verbose: bool | None = Field(None, description="Return the prompt as text, in `__verbose`, as llama-server does.")
    chat_template: None = Field(None, description="Not supported: only the template of the server is run.")
    verbosity: Ignored
    prediction: Ignored
    web_search_options: Ignored
    audio: Ignored
    modalities: list[Literal["text"]] | None = None

    @field_validator("chat_template", mode="before")
    @classmethod
    def _no_template(cls, value: Any) -> Any:
        if value is not None:
            raise ValueError("templates of requests are not run; leave it out")
        return value


class TopLogprob(ResponseModel):
    token: str
    logprob: float
    bytes: list[int] | None


class TokenLogprobs(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChoiceLogprobs(ResponseModel):
    content: list[TokenLogprobs] | None


class AnswerFunction(ResponseModel):
    name: str
    arguments: str


class AnswerToolCall(ResponseModel):
    id: str
    type: Literal["function"]
    function: AnswerFunction


class FileCitation(ResponseModel):
    """A passage of a file that supports the answer: characters `start` to `end` of its text, as in /v1/files/{id}/content.
    `index`: position of the file among those of the request; `file_id` is null for a file that came with the request."""

    type: Literal["file_citation"]
    file_id: str | None
    filename: str
    index: int
    start: int
    end: int
    page: int | None
    line: int
    text: str


class DocumentFacts(ResponseModel):
    """How the answer was obtained from files: from their `whole` text, or by a strategy for long documents."""

    strategy: Literal["whole", "map_reduce", "retrieve"]
    reason: str
    notes: list[str]
    context_tokens: int = Field(description="Tokens of the last prompt and its reply; usage counts those of all prompts.")


class ChatMessage(ResponseModel):
    role: Literal["assistant"]
    content: str | None
    annotations: list[FileCitation] | None = None
    document: DocumentFacts | None = None
    reasoning_content: str | None = None
    tool_calls: list[AnswerToolCall] | None = None
    function_call: AnswerFunction | None = None


class ChatChoice(ResponseModel):
    index: int
    message: ChatMessage
    logprobs: ChoiceLogprobs | None
    finish_reason: Literal["stop", "length", "tool_calls", "function_call"]
    stop_reason: str | int | None = Field(None, description="The stop string or stop token of the request that ended the text.")
    token_ids: list[int] | None = None


class ChatCompletion(ResponseModel):
    """The answer to a chat. A stream's chunks (`chat.completion.chunk`) have the same format, with `delta` for `message`."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: Usage
    prompt_logprobs: PromptLogprobList | None = None
    prompt_token_ids: list[int] | None = None
    timings: NativeTimings | None = None


EXAMPLE: dict[str, Any] = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 16}
