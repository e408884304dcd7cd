"""Responses of Anthropic's Messages API, for the OpenAPI schema."""

from __future__ import annotations

from typing import Any, Literal

from ....backends.qualities import Quality
from ..base import ResponseModel


class AnthropicUsage(ResponseModel):
    """Numbers of tokens. Those of the prompt are `input_tokens` and `cache_read_input_tokens` together. `quality`: of models
    with several, the one that was used."""

    input_tokens: int
    cache_creation_input_tokens: int
    cache_read_input_tokens: int
    output_tokens: int
    quality: Quality | None = None


class AnthropicMessage(ResponseModel):
    """An answer. `content` contains blocks of types text, thinking and tool_use."""

    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    content: list[dict[str, Any]]
    stop_reason: Literal["end_turn", "max_tokens", "stop_sequence", "tool_use"]
    stop_sequence: str | None
    usage: AnthropicUsage


class TokenCount(ResponseModel):
    input_tokens: int


class AnthropicErrorDetail(ResponseModel):
    type: str
    message: str


class AnthropicError(ResponseModel):
    type: Literal["error"]
    error: AnthropicErrorDetail
