"""/generate and /generate_stream, as Hugging Face's text-generation-inference (TGI) has them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field

from .base import Body, ResponseModel, parse
from .by_quality import ByQuality
from .completions import CompletionRequest
from .sampling import _Stop, _Tokens

_DEFAULT_TOKENS = 100  # TGI's default
_SAMPLED = ("temperature", "top_k", "top_p", "typical_p")  # fields that turn sampling on, as in TGI


class Grammar(Body):
    """A form of the text: a JSON schema, or a regular expression."""

    type: Literal["json", "json_schema", "regex"]
    value: Any


class Parameters(ByQuality):
    """Parameters of the generation; others are ignored. Without a sampling parameter, decoding is greedy."""

    model_config = ConfigDict(extra="ignore")

    max_new_tokens: _Tokens | None = None
    do_sample: bool | None = None
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_k: Annotated[int, Field(ge=0, le=(1 << 31) - 1)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    typical_p: Annotated[float, Field(gt=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=100)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    seed: Annotated[int, Field(ge=0, le=(1 << 64) - 1)] | None = None
    stop: Annotated[list[_Stop], Field(max_length=16)] | None = None
    return_full_text: bool | None = None
    details: bool | None = None
    top_n_tokens: Annotated[int, Field(ge=0, le=20)] | None = None
    grammar: Grammar | None = None
    best_of: Annotated[int, Field(ge=1, le=1)] | None = None
    truncate: Annotated[int, Field(ge=1)] | None = Field(None, description="Keep only the last tokens of the prompt.")


class TgiRequest(Body):
    """A text to continue."""

    inputs: Annotated[str, Field(min_length=1)]
    parameters: Parameters | None = None
    stream: bool | None = None


class TgiText(ResponseModel):
    generated_text: str
    details: dict[str, Any] | None = None


class TgiError(ResponseModel):
    error: str
    error_type: str


def completion_request(body: TgiRequest, details: bool) -> CompletionRequest:
    """Converts a request to one in OpenAI's format.

    Args:
        body: the request.
        details: whether the response contains tokens with their log probabilities.

    Raises:
        ApiError: 400, a value that completions do not support.
    """
    given = body.parameters or Parameters.model_validate({})
    fields = given.model_dump(
        include={
            "temperature",
            "top_k",
            "top_p",
            "typical_p",
            "repetition_penalty",
            "frequency_penalty",
            "seed",
            "quality",
            "min_quality",
        },
        exclude_none=True,
    )
    if not given.do_sample and all(getattr(given, name) is None for name in _SAMPLED):
        fields["temperature"] = 0.0
    if given.grammar is not None and given.grammar.type == "regex":
        fields["guided_regex"] = given.grammar.value
    elif given.grammar is not None:
        schema = given.grammar.value
        if isinstance(schema, dict) and isinstance(schema.get("schema"), dict):
            schema = schema["schema"]
        fields["response_format"] = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}
    return parse(
        CompletionRequest,
        {
            **fields,
            "prompt": body.inputs,
            "max_tokens": given.max_new_tokens or _DEFAULT_TOKENS,
            "stop": given.stop or None,
            "include_stop_str_in_output": True,
            "logprobs": (given.top_n_tokens or 0) if details else None,
        },
    )


EXAMPLE: dict[str, Any] = {"inputs": "Once upon a time", "parameters": {"max_new_tokens": 16}}
