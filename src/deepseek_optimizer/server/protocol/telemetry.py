"""llama-server's fields that ask for timings, progress and the prompt."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from .base import Body, ResponseModel


class Telemetry(Body):
    """Fields of requests that generate text."""

    timings_per_token: bool | None = Field(
        None, description="Return `timings`, as llama-server does: with the answer, and in a stream with each token."
    )
    return_progress: bool | None = Field(
        None, description="In a stream: report how much of the prompt has been processed, in `prompt_progress` of chunks."
    )


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


class PromptProgress(ResponseModel):
    """Numbers of tokens: of the whole prompt, of those found in the prefix cache, and of those processed, with those found."""

    total: int
    cache: int
    processed: int
    time_ms: float


Verbose = dict[str, Any]
