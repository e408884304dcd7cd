"""/completion, /infill, /apply-template and /slots, as llama-server has them. Fields of caches are ignored."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, field_validator

from ...backends.qualities import Quality
from .base import TOKEN_ID, Body, ModelName, ResponseModel, parse
from .chat import _Scalar
from .completions import MAX_PROMPTS, CompletionRequest
from .formats import Guided
from .messages import Messages, Tools
from .prompt_parts import MixedPrompt, PromptObject
from .sampling import Sampling
from .telemetry import NativeTimings

_Text = Annotated[str, Field(min_length=1)]
MAX_BIAS_TEXT = 256  # characters of a text whose tokens are biased
_Bias = float | Literal[False]
_BiasText = Annotated[str, Field(min_length=1, max_length=MAX_BIAS_TEXT)]
_Pair = Annotated[list[TOKEN_ID | _Bias | _BiasText], Field(min_length=2, max_length=2)]
_Biases = (
    Annotated[dict[_BiasText, _Bias], Field(max_length=1024)] | Annotated[list[_Pair], Field(max_length=1024, fail_fast=True)]
)
_FieldPath = Annotated[str, Field(min_length=1, max_length=128)]


class _Generation(Sampling, Guided):
    """Fields of a generation. Those of `Sampling` have the same meaning here."""

    model_config = ConfigDict(extra="ignore")

    model: ModelName = None
    ignore_eos: bool | None = Field(None, description="Never generate a token that ends the text.")
    logit_bias: _Biases | None = Field(  # type: ignore[assignment]  # a form of its own
        None,
        description="By token id or text, or pairs of these and a bias; false forbids a token. A text stands for each of its "
        "tokens.",
    )
    n_probs: Annotated[int, Field(ge=0, le=20)] | None = Field(None, description="Most likely tokens to report per token.")
    post_sampling_probs: bool | None = Field(
        None, description="With n_probs: report the probabilities after all samplers, in `prob` and `top_probs`."
    )
    return_tokens: bool | None = Field(None, description="Return the ids of the new tokens. A stream always has them.")
    response_fields: Annotated[list[_FieldPath], Field(max_length=64)] | None = Field(
        None, description="The fields of the answer to return; a/b is the field b of a."
    )

    @field_validator("logit_bias")
    @classmethod
    def _pairs_of_key_and_bias(cls, value: Any) -> Any:
        if isinstance(value, list) and any(isinstance(one[0], (float, bool)) or isinstance(one[1], str) for one in value):
            raise ValueError("a pair must be a token id or a text, and a bias")
        return value


class NativeCompletionRequest(_Generation):
    """A text to continue: a string, token ids, both mixed, an object with prompt_string, or several of them."""

    prompt: (
        _Text
        | PromptObject
        | MixedPrompt
        | Annotated[list[_Text | PromptObject | MixedPrompt], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True)]
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
    add_generation_prompt: bool | None = Field(None, description="Append the start of an answer; the default.")


class PromptText(ResponseModel):
    prompt: str


class NextToken(ResponseModel):
    has_next_token: bool
    n_remain: int = Field(description="Number of tokens that may still be generated; -1: the slot is idle.")
    n_decoded: int


class Slot(ResponseModel):
    """A place in the batch. Prompts and parameters of requests are not shown."""

    id: int
    n_ctx: int
    speculative: bool
    is_processing: bool
    id_task: int = Field(description="Number of the request; -1: none.")
    n_prompt_tokens: int
    next_token: list[NextToken]


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
    quality: Quality | None = None


def completion_request(body: _Generation, tokens_of: Mapping[str, list[int]], eos: frozenset[int]) -> CompletionRequest:
    """Converts the fields of a generation to a request in OpenAI's format, whose prompt is a placeholder.

    Args:
        body: the request.
        tokens_of: token ids of the texts in its logit_bias, see `bias_texts`.
        eos: tokens that end a text, which ignore_eos forbids.

    Raises:
        ApiError: 400, a value that completions do not support.
    """
    omitted = {"prompt", "logit_bias", "ignore_eos"}
    shared = CompletionRequest.model_fields.keys() & body.model_fields_set - omitted
    fields: dict[str, Any] = body.model_dump(include=shared, by_alias=True, exclude_none=True)
    biases: dict[str, float] = {}
    for key, bias in _pairs(body):
        for token in [int(key)] if is_token(key) else tokens_of[str(key)]:
            biases[str(token)] = -100 if bias is False else bias
    if body.ignore_eos:
        biases |= {str(token): -100 for token in eos}
    if biases:
        fields["logit_bias"] = biases
    if body.n_probs:
        fields["logprobs"] = body.n_probs
    return parse(CompletionRequest, {**fields, "prompt": " "})


def bias_texts(body: _Generation) -> list[str]:
    """The texts in a request's logit_bias."""
    return [str(key) for key, _ in _pairs(body) if not is_token(key)]


def is_token(key: Any) -> bool:
    """Whether a key of a logit_bias is a token id; otherwise it is a text."""
    return isinstance(key, int) or (isinstance(key, str) and key.isdecimal() and key.isascii() and len(key) <= 10)


def _pairs(body: _Generation) -> list[tuple[Any, Any]]:
    biases = body.logit_bias
    if biases is None:
        return []
    pairs = biases.items() if isinstance(biases, dict) else [(one[0], one[1]) for one in biases]
    return list(pairs)


EXAMPLE: dict[str, Any] = {"prompt": "Once upon a time", "n_predict": 16}
EXAMPLE_INFILL: dict[str, Any] = {"input_prefix": "def f(x):\n    return ", "input_suffix": "\n", "n_predict": 16}
EXAMPLE_TEMPLATE: dict[str, Any] = {"messages": [{"role": "user", "content": "Hello"}]}
