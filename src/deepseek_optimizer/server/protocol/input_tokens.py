"""/v1/chat/completions/input_tokens and /v1/responses/input_tokens."""

from __future__ import annotations

from typing import Literal

from .base import ResponseModel


class InputTokens(ResponseModel):
    object: Literal["chat.completion.input_tokens", "response.input_tokens"]
    input_tokens: int
