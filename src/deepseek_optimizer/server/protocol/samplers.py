"""Samplers beyond OpenAI's, under llama-server's and vLLM's names."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from .base import TOKEN_ID, IgnoredFields

_Unit = Annotated[float, Field(ge=0, le=1)]
_LastN = Annotated[int, Field(ge=-1, le=(1 << 31) - 1)]
_Breaker = Annotated[str, Field(min_length=1, max_length=64)]
_Word = Annotated[str, Field(min_length=1, max_length=256)]
_REPEAT_LAST_N = 64  # llama-server's default


class Samplers(IgnoredFields):
    """Fields that are omitted or null have no effect. `SamplingParams` defines them and their order."""

    typical_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_n_sigma: Annotated[float, Field(ge=-1, le=100)] | None = Field(None, description="0 or less: off.")
    xtc_probability: _Unit | None = None
    xtc_threshold: _Unit | None = Field(None, description="The default is 0.1.")
    dry_multiplier: Annotated[float, Field(ge=0, le=100)] | None = Field(None, description="0: no DRY penalty.")
    dry_base: Annotated[float, Field(ge=1, le=100)] | None = Field(None, description="The default is 1.75.")
    dry_allowed_length: Annotated[int, Field(ge=0, le=(1 << 31) - 1)] | None = Field(None, description="The default is 2.")
    dry_penalty_last_n: _LastN | None = Field(None, description="-1, the default: the whole prompt and text.")
    dry_sequence_breakers: Annotated[list[_Breaker], Field(max_length=16)] | None = Field(
        None, description='The default is ["\\n", ":", "\\"", "*"].'
    )
    mirostat: Literal[0, 1, 2] | None = None
    mirostat_tau: Annotated[float, Field(ge=0, le=100)] | None = Field(None, description="The default is 5.")
    mirostat_eta: _Unit | None = Field(None, description="The default is 0.1.")
    repeat_penalty: Annotated[float, Field(gt=0, le=100)] | None = Field(
        None, description="repetition_penalty of the last repeat_last_n tokens."
    )
    repeat_last_n: _LastN | None = Field(
        None, description="-1: the whole prompt and text. With repeat_penalty, the default is 64; with repetition_penalty, -1."
    )
    use_beam_search: bool | None = Field(
        None, description="n is the number of beams, at most 10; samplers and temperature have no effect. Not with stream."
    )
    length_penalty: Annotated[float, Field(ge=-10, le=10)] | None = Field(None, description="Of beam search; the default is 1.")
    bad_words: Annotated[list[_Word], Field(max_length=128)] | None = Field(None, description="Must not occur in the text.")
    allowed_token_ids: Annotated[list[TOKEN_ID], Field(min_length=1, max_length=1 << 18, fail_fast=True)] | None = Field(
        None, description="No other tokens are generated."
    )

    def sampler_values(self) -> dict[str, Any]:
        """The fields of `SamplingParams` that these fields set, except those that need a tokenizer (`chat.words`)."""
        names = ("typical_p", "xtc_probability", "xtc_threshold", "dry_multiplier", "dry_base", "dry_allowed_length",
                 "mirostat", "mirostat_tau", "mirostat_eta")  # fmt: skip
        values = {name: value for name in names if (value := getattr(self, name)) is not None}
        if self.top_n_sigma is not None:
            values["top_n_sigma"] = max(self.top_n_sigma, 0)
        if self.dry_penalty_last_n is not None and self.dry_penalty_last_n >= 0:
            values["dry_last_n"] = self.dry_penalty_last_n
        last_n = self.repeat_last_n
        if self.repeat_penalty is not None:
            values["repetition_penalty"] = self.repeat_penalty
            last_n = _REPEAT_LAST_N if last_n is None else last_n
        if last_n is not None and last_n >= 0:
            values["repetition_window"] = last_n
        if self.allowed_token_ids is not None:
            values["allowed_token_ids"] = tuple(self.allowed_token_ids)
        return values
