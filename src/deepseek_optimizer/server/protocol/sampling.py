"""Sampling parameters: OpenAI's fields, and further common ones under vLLM's names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, TypeAdapter, ValidationError, model_validator

from ...backends.qualities import Quality
from ...engine.pictures import PictureRows
from ...engine.request import (
    MAX_PRIORITY,
    MAX_STOP_CHARACTERS,
    MAX_STOPS,
    CompiledGrammar,
    Request,
    SamplingParams,
)
from ..http.problems import ApiError
from .base import TOKEN_ID
from .by_quality import ByQuality
from .reports import Reports
from .samplers import Samplers
from .telemetry import Telemetry

MAX_N = 32
_MAX_SEED = (1 << 64) - 1

_Stop = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARACTERS)]
_TokenKey = Annotated[str, Field(pattern="^[0-9]{1,10}$")]
_Tokens = Annotated[int, Field(ge=1, le=(1 << 31) - 1)]
# Some clients write -1 for "no limit" or "random" where OpenAI's write null.
_NONE_IF_NEGATIVE = AfterValidator(lambda value: None if value == -1 else value)
MaxTokens = Annotated[Literal[-1] | _Tokens | None, _NONE_IF_NEGATIVE]
MaxTokensOrZero = Annotated[Annotated[int, Field(ge=-1, le=(1 << 31) - 1)] | None, _NONE_IF_NEGATIVE]
Seed = Annotated[Annotated[int, Field(ge=-1, le=_MAX_SEED)] | None, _NONE_IF_NEGATIVE]
Priority = Annotated[
    Annotated[int, Field(ge=-MAX_PRIORITY, le=MAX_PRIORITY)] | None,
    AfterValidator(lambda value: value and max(value, 0)),  # no request comes before those without a priority
    Field(description="Requests with lower values come first; the default is 0, and so are negative values."),
]
_Unit = Annotated[float, Field(ge=0, le=1)]
_Biases = Annotated[dict[_TokenKey, Annotated[float, Field(ge=-100, le=100)]], Field(max_length=1024)]
_Penalty = Annotated[float, Field(ge=-2, le=2)]
_N = TypeAdapter[int | None](Annotated[int, Field(ge=1, le=MAX_N)] | None)


class Sampling(Samplers, Reports, ByQuality, Telemetry):
    """Fields that are omitted or null have the values recommended by the model's authors or, without any, OpenAI's defaults."""

    max_tokens: MaxTokens = Field(
        None,
        description="Maximum number of new tokens. If it is omitted, null or -1: what the context has room for, but at most "
        "the server's --max-answer-tokens.",
    )
    n_predict: MaxTokensOrZero = Field(
        None, description="llama-server's name of max_tokens: if the context has less room, the text ends there."
    )
    temperature: Annotated[float, Field(ge=0, le=100)] | None = Field(None, description="0: greedy decoding.")
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    n: Annotated[int, Field(ge=1, le=MAX_N)] | None = None
    seed: Seed = Field(
        None,
        description="The same request with the same seed gives the same text. The i-th of n answers has the seed + i. -1: "
        "random.",
    )
    stop: _Stop | Annotated[list[_Stop], Field(max_length=MAX_STOPS)] | None = None
    presence_penalty: _Penalty | None = None
    frequency_penalty: _Penalty | None = None
    logit_bias: _Biases | None = None
    stream: bool | None = None

    top_k: Annotated[int, Field(ge=-1, le=(1 << 31) - 1)] | None = Field(None, description="0 or -1: all.")
    min_p: _Unit | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=100)] | None = None
    min_tokens: Annotated[int, Field(ge=0, le=(1 << 31) - 1)] | None = None
    ignore_eos: bool | None = None
    stop_token_ids: Annotated[list[TOKEN_ID], Field(max_length=64)] | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    priority: Priority = None

    @model_validator(mode="before")
    @classmethod
    def _n_predict(cls, data: Any) -> Any:
        if isinstance(data, dict) and data.get("n_predict") is not None and data.get("max_tokens") is None:
            return {**data, "max_tokens": data["n_predict"]}
        return data

    def params(
        self,
        defaults: Mapping[str, Any],
        *,
        max_tokens: int | None,
        logprobs: int | None,
        grammar: CompiledGrammar | None = None,
        keep_special: bool = False,
        words: Mapping[str, Any] | None = None,
    ) -> SamplingParams:
        """Converts the fields to the engine's parameters.

        Args:
            defaults: values recommended by the model's authors.
            max_tokens: from whichever field of the request sets it.
            logprobs: number of most likely tokens; None: no log probabilities.
            grammar: that constrains the text.
            keep_special: keep special tokens in the text, for the parser of tool calls.
            words: further parameters, of `chat.words`.

        Raises:
            RequestError: a value that the engine does not support.
            ApiError: 400, values that contradict each other.
        """
        if self.min_tokens is not None and max_tokens is not None and self.min_tokens > max_tokens:
            raise ApiError(400, "min_tokens: must not exceed max_tokens", param="min_tokens")
        supported = {field.name for field in fields(SamplingParams)}
        values: dict[str, Any] = {name: value for name, value in defaults.items() if name in supported}
        for name in ("temperature", "top_p", "presence_penalty", "frequency_penalty", "min_p", "repetition_penalty",
                     "min_tokens", "ignore_eos", "seed", "skip_special_tokens"):  # fmt: skip
            if (value := getattr(self, name)) is not None:
                values[name] = value
        values |= self.sampler_values() | dict(words or {})
        if self.top_k is not None:
            values["top_k"] = max(self.top_k, 0)
        if keep_special:
            values["skip_special_tokens"] = False
        return SamplingParams(
            **values,
            max_tokens=max_tokens,
            stop=(self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ()),
            include_stop=bool(self.include_stop_str_in_output),
            stop_token_ids=tuple(self.stop_token_ids or ()),
            logit_bias={int(token): bias for token, bias in (self.logit_bias or {}).items()},
            logprobs=logprobs,
            grammar=grammar,
        )


def requested_answers(body: Mapping[str, Any]) -> int:
    """The number of answers that a body requests, for admission. The body has not been validated, so this is an estimate."""
    counts = [1]
    for name in ("n", "best_of"):
        try:
            counts.append(_N.validate_python(body.get(name)) or 1)  # converts as the tolerant validation does
        except ValidationError:
            pass
    prompts = body.get("prompt", body.get("input"))
    # A list with token ids at its top level is one prompt.
    several = isinstance(prompts, list) and prompts and not any(isinstance(part, int) for part in prompts[:1000])
    count = len(prompts) if several else 1
    return max(counts) * count


def seeded(params: SamplingParams, index: int) -> SamplingParams:
    """The parameters of the index-th answer to a prompt. With a seed, answers must differ and be reproducible."""
    if params.seed is None or index == 0:
        return params
    return replace(params, seed=(params.seed + index) & _MAX_SEED)


def whole_salt(key_salt: str, cache_salt: str | None) -> str:
    """The salt of the caches for a request.

    Args:
        key_salt: of the API key.
        cache_salt: of the request; None: it has none.
    """
    return key_salt if cache_salt is None else f"{key_salt}\n{cache_salt}"  # the key's has no line break


def requests_for(
    prompts: list[list[int]],
    params: SamplingParams,
    n: int,
    *,
    id: str,
    salt: str,
    client: str,
    deadline: float,
    priority: int | None,
    pinned: tuple[tuple[int, int], ...] = (),
    adapter: str = "",
    cache_salt: str | None = None,
    prompt_logprobs: int | None = None,
    progress: bool = False,
    pictures: PictureRows | None = None,
    quality: Quality | None = None,
    min_quality: Quality | None = None,
) -> list[Request]:
    """The engine's requests, one for each answer; those for the first prompt come first.

    Args:
        prompts: token ids.
        params: of all answers.
        n: answers to each prompt.
        id: of the API request.
        salt: of the API key, for the prefix cache.
        client: key of the client.
        deadline: time of `time.monotonic`.
        priority: None: 0.
        pinned: (begin, end) of prompt tokens that a cache window must keep.
        adapter: name of a LoRA adapter; "": none.
        cache_salt: of the request, in addition to the key's.
        prompt_logprobs, progress, pictures, quality, min_quality: see `Request`.
    """
    salt = whole_salt(salt, cache_salt)
    return [
        Request(
            prompt,
            seeded(params, i),
            id=id,
            pinned=pinned,
            salt=salt,
            client=client,
            deadline=deadline,
            priority=priority or 0,
            adapter=adapter,
            prompt_logprobs=prompt_logprobs,
            progress=progress,
            pictures=pictures,
            quality=quality,
            min_quality=min_quality,
        )
        for prompt in prompts
        for i in range(n)
    ]
