"""/v1/fim/completions, as Mistral has it: fills a gap, and answers in the format of a chat.

Source: https://docs.mistral.ai/api/#tag/fim
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from .base import Body, Ignored, ModelName, parse
from .completions import CompletionRequest
from .sampling import MAX_STOPS, MaxTokens, Seed, _Penalty, _Stop


class FimRequest(Body):
    """A gap in a text. Control tokens in the texts are not recognized."""

    model: ModelName = None
    prompt: Annotated[str, Field(min_length=1, description="Text before the gap.")]
    suffix: str | None = Field(None, description="Text after the gap.")
    max_tokens: MaxTokens = Field(None, description="Maximum number of new tokens; by default as for chats.")
    min_tokens: Annotated[int, Field(ge=0, le=(1 << 31) - 1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    presence_penalty: _Penalty | None = None
    frequency_penalty: _Penalty | None = None
    random_seed: Seed = None
    stop: _Stop | Annotated[list[_Stop], Field(max_length=MAX_STOPS)] | None = None
    stream: bool | None = None
    metadata: Ignored


def completion_request(body: FimRequest) -> CompletionRequest:
    """Converts a request to one in OpenAI's format, without `suffix`.

    Raises:
        ApiError: 400, a value that completions do not support.
    """
    fields = body.model_dump(exclude={"model", "suffix", "random_seed", "metadata"}, exclude_none=True)
    return parse(CompletionRequest, {**fields, "seed": body.random_seed})


EXAMPLE: dict[str, Any] = {"prompt": "def f(x):\n    return ", "suffix": "\n", "max_tokens": 16}
