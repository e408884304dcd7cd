"""/tokenize and /detokenize, compatible with vLLM's."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI, Request, Response

from ..chat.intake import admitted_request
from ..chat.old_functions import with_tool_calls
from ..chat.prompts import tokens_of
from ..chat.replies import json_response
from ..http.caller import Caller
from ..http.problems import ApiError
from ..openapi import body_errors, reads
from ..protocol.models import (
    EXAMPLE_DETOKENIZE,
    EXAMPLE_TOKENIZE,
    DetokenizeRequest,
    Text,
    TokenizeRequest,
    Tokens,
)
from ..state import ServerState


def add(app: FastAPI, state: ServerState) -> None:
    @app.post(
        "/tokenize",
        response_model=Tokens,
        responses=body_errors(),
        openapi_extra=reads(TokenizeRequest, EXAMPLE_TOKENIZE),
        tags=["tokens"],
    )
    async def tokenize(request: Request) -> Response:
        """Tokenizes a text, or a chat with the model's chat template."""
        async with admitted_request(state, request, TokenizeRequest, one=True) as (body, _, caller):
            return await tokens(body, caller)

    async def tokens(body: TokenizeRequest, caller: Caller) -> Response:
        if (body.prompt is None) == (body.messages is None):
            raise ApiError(400, "prompt: give either prompt or messages", param="prompt")
        if body.messages is not None:
            messages = with_tool_calls([message.model_dump(exclude_none=True) for message in body.messages])
            tools = [tool.model_dump(exclude_none=True) for tool in body.tools or ()] or None
            options = body.chat_template_kwargs or {}
            ids = await state.tokenizing(lambda lane: lane.template.render(messages, tools=tools, options=options).ids, caller)
        else:
            text, special = body.prompt or "", body.add_special_tokens is not False
            ids = await state.tokenizing(lambda lane: tokens_of(lane.tokenizer, text, special), caller)
        result: dict[str, Any] = {"count": len(ids), "max_model_len": state.engine.context, "tokens": ids}
        if body.return_token_strs:
            result["token_strs"] = [state.texts.text(token) for token in ids]
        return json_response(result)

    @app.post(
        "/detokenize",
        response_model=Text,
        responses=body_errors(),
        openapi_extra=reads(DetokenizeRequest, EXAMPLE_DETOKENIZE),
        tags=["tokens"],
    )
    async def detokenize(request: Request) -> Response:
        """Decodes tokens, including special ones."""
        async with admitted_request(state, request, DetokenizeRequest, one=True) as (body, _, caller):
            if any(token >= state.engine.vocab_size for token in body.tokens):
                raise ApiError(400, f"tokens: must be ids from 0 to {state.engine.vocab_size - 1}", param="tokens")
            text = await state.tokenizing(lambda lane: lane.tokenizer.decode(body.tokens), caller)
        return json_response({"prompt": text})
