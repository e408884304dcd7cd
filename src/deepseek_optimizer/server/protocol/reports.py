"""What an answer reports besides its text: log probabilities of the prompt and token ids, under vLLM's names."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from ...engine.request import MAX_LOGPROBS
from .base import Body, ResponseModel


class Reports(Body):
    """vLLM's fields for evaluation, and the salt of the caches."""

    prompt_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = Field(
        None, description="Number of most likely tokens to report for each prompt token. Not available with stream."
    )
    return_token_ids: bool | None = Field(None, description="Return the token ids of prompt and answer.")
    return_tokens_as_token_ids: bool | None = Field(None, description="In log probabilities, write tokens as token_id:ID.")
    cache_salt: Annotated[str, Field(min_length=1, max_length=256)] | None = Field(
        None, description="Only requests with the same salt, and the same API key, share cached prefixes and pictures."
    )


class PromptLogprob(ResponseModel):
    """Log probability of a token at a position of the prompt; `rank` 1: the most likely one."""

    logprob: float
    rank: int
    decoded_token: str


PromptLogprobList = Annotated[
    list[dict[str, PromptLogprob] | None],
    Field(description="For each prompt token, by token id: that token and the most likely ones; null for the first token."),
]
