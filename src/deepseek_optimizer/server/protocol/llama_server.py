"""/completion, /infill and /apply-template, as llama-server has them. Fields of slots and caches are ignored."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field

from .base import TOKEN_ID, Body, ModelName, ResponseModel, parse
from .chat import _Scalar
from .completions import MAX_PROMPTS, CompletionRequest
from .formats import Guided
from .messages import Messages, Tools
from .sampling import Sampling

_Mixed = Annotated[list[TOKEN_ID | str], Field(min_length=1, max_length=1_000_000, fail_fast=True)]
_Bias = float | Literal[False]
_Pair = Annotated[list[TOKEN_ID | _Bias], Field(min_length=2, max_length=2)]
_Biases = (
    Annotated[dict[Annotated[str, Field(max_length=16)], _Bias], Field(max_length=1024)]
    | Annotated[list[_Pair], Field(max_length=1024, fail_fast=True)]
)


class _Generation(Sampling, Guided):
    """Fields of a generation. Those of `Sampling` have the same meaning here."""

    model_config = ConfigDict(extra="ignore")

    model: ModelName = None
    logit_bias: _Biases | None = Field(  # type: ignore[assignment]  # a form of its own
        None, description="By token id, or pairs of token id and bias; false forbids the token."
    )
    n_probs: Annotated[int, Field(ge=0, le=20)] | None = Field(None, description="Most likely tokens to report per token.")
    return_tokens: bool | None = Field(None, description="Return the ids of the new tokens.")


class NativeCompletionRequest(_Generation):
    """A text to continue: a string, token ids, both mixed, or several of them."""

    prompt: (
        Annotated[str, Field(min_length=1)]
        | _Mixed
        | Annotated[list[Annotated[str, Field(min_length=1)] | _Mixed], Field(min_length=1, max_length=MAX_PROMPTS)]
    )


class ExtraFile(Body):
    """Another file, for context."""

    model_config = ConfigDict(extra="ignore")

    filename: Annotated[str, Field(max_length=4096)] | None = None
    text: str


class InfillRequest(_Generation):
    """A gap to fill between two texts; `prompt` is the beginning of what fills it."""

    input_prefix: str = ""
    input_suffix: str = ""
    input_extra: Annotated[list[ExtraFile], Field(max_length=1000, fail_fast=True)] | None = None
    prompt: str = ""


class ApplyTemplateRequest(Body):
    """A chat whose prompt is returned as text."""

    model_config = ConfigDict(extra="ignore")

    model: ModelName = None
    messages: Messages
    tools: Tools | None = None
    chat_template_kwargs: Annotated[dict[str, _Scalar], Field(max_length=16)] | None = None


class PromptText(ResponseModel):
    prompt: str


class NativeTimings(ResponseModel):
    cache_n: int
    prompt_n: int
    prompt_ms: float
    prompt_per_token_ms: float
    prompt_per_second: float
    predicted_n: int
    predicted_ms: float
    predicted_per_token_ms: float
    predicted_per_second: float


class NativeCompletion(ResponseModel):
    """A completion. For several prompts, the response is a list of them."""

    index: int
    content: str
    tokens: list[int]
    id_slot: int
    stop: bool
    model: str
    tokens_predicted: int
    tokens_evaluated: int
    tokens_cached: int
    generation_settings: dict[str, Any]
    prompt: str
    has_new_line: bool
    truncated: bool
    stop_type: Literal["eos", "limit", "word", "none"]
    stopping_word: str
    timings: NativeTimings
    completion_probabilities: list[dict[str, Any]] | None = None


def completion_request(body: _Generation) -> CompletionRequest:
    """Converts the fields of a generation to a request in OpenAI's format, whose prompt is a placeholder.

    Raises:
        ApiError: 400, a value that completions do not support.
    """
    shared = CompletionRequest.model_fields.keys() & body.model_fields_set - {"prompt", "logit_bias"}
    fields: dict[str, Any] = body.model_dump(include=shared, by_alias=True, exclude_none=True)
    if body.logit_bias is not None:
        pairs = body.logit_bias.items() if isinstance(body.logit_bias, dict) else body.logit_bias
        fields["logit_bias"] = {str(token): -100 if bias is False else bias for token, bias in pairs}
    if body.n_probs:
        fields["logprobs"] = body.n_probs
    return parse(CompletionRequest, {**fields, "prompt": " "})


EXAMPLE: dict[str, Any] = {"prompt": "Once upon a time", "n_predict": 16}
EXAMPLE_INFILL: dict[str, Any] = {"input_prefix": "def f(x):\n    return ", "input_suffix": "\n", "n_predict": 16}
EXAMPLE_TEMPLATE: dict[str, Any] = {"messages": [{"role": "user", "content": "Hello"}]}
