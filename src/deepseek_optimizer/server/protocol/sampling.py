"""How tokens are chosen: OpenAI's fields, and the usual ones beside them under vLLM's names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Annotated, Any

from pydantic import Field

from ...engine.request import (
    MAX_STOP_CHARACTERS,
    MAX_STOPS,
    CompiledGrammar,
    Request,
    SamplingParams,
)
from ..http.problems import ApiError
from .base import TOKEN_ID, Harmless

MAX_N = 32
_MAX_SEED = (1 << 64) - 1

_Stop = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARACTERS)]
_TokenKey = Annotated[str, Field(pattern="^[0-9]{1,10}$")]
_Tokens = Annotated[int, Field(ge=1, le=(1 << 31) - 1)]
_Unit = Annotated[float, Field(ge=0, le=1)]
_Biases = Annotated[dict[_TokenKey, Annotated[float, Field(ge=-100, le=100)]], Field(max_length=1024)]
_Penalty = Annotated[float, Field(ge=-2, le=2)]


class Sampling(Harmless):
    """Fields left out, or null, are as the model's authors chose, and else as OpenAI's."""

    max_tokens: _Tokens | None = Field(None, description="New tokens at most; without it, as many as there is room for.")
    temperature: Annotated[float, Field(ge=0, le=100)] | None = Field(None, description="0 takes the likeliest token.")
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    n: Annotated[int, Field(ge=1, le=MAX_N)] | None = None
    seed: Annotated[int, Field(ge=0, le=_MAX_SEED)] | None = Field(
        None, description="The same request with the same seed gives the same text. Of n answers the i-th has seed + i."
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
    priority: Annotated[int, Field(ge=0, le=1000)] | None = Field(None, description="Higher waits for lower; the default is 0.")

    def params(
        self,
        defaults: Mapping[str, Any],
        *,
        max_tokens: int | None,
        logprobs: int | None,
        grammar: CompiledGrammar | None = None,
        keep_special: bool = False,
    ) -> SamplingParams:
        """For the engine.

        Args:
            defaults: what the model's authors chose.
            max_tokens: what the request's fields of that meaning come to.
            logprobs: how many of the likeliest tokens.
            keep_special: special tokens mark tool calls, so the parser of the text must see them.

        Raises:
            RequestError: a value that the engine does not take.
            ApiError: 400, values that contradict each other.
        """
        if self.min_tokens is not None and max_tokens is not None and self.min_tokens > max_tokens:
            raise ApiError(400, "min_tokens: must not be more than max_tokens", param="min_tokens")
        known = {field.name for field in fields(SamplingParams)}
        values: dict[str, Any] = {name: value for name, value in defaults.items() if name in known}
        for name in ("temperature", "top_p", "presence_penalty", "frequency_penalty", "min_p", "repetition_penalty",
                     "min_tokens", "ignore_eos", "seed", "skip_special_tokens"):  # fmt: skip
            if (value := getattr(self, name)) is not None:
                values[name] = value
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


def answers_asked(body: Mapping[str, Any]) -> int:
    """How many answers a body that is not checked yet asks for, as far as that can be told: what admission counts."""
    n = body.get("n")
    prompts = body.get("prompt", body.get("input"))
    several = isinstance(prompts, list) and prompts and isinstance(prompts[0], (str, list))
    count = len(prompts) if several else 1
    return (n if isinstance(n, int) and not isinstance(n, bool) and 1 <= n <= MAX_N else 1) * count


def seeded(params: SamplingParams, index: int) -> SamplingParams:
    """For the index-th of several answers to one prompt: with a seed they must differ, and be the same again next time."""
    if params.seed is None or index == 0:
        return params
    return replace(params, seed=(params.seed + index) & _MAX_SEED)


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
) -> list[Request]:
    """One for each answer: those to the first prompt first."""
    return [
        Request(
            prompt, seeded(params, i), id=id, pinned=pinned, salt=salt, client=client, deadline=deadline, priority=priority or 0
        )
        for prompt in prompts
        for i in range(n)
    ]
