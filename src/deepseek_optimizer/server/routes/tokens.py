"""/tokenize and /detokenize, as vLLM has them."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI, Request, Response

from ..chat.intake import admitted_request
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
        """The tokens of a text, or of a chat as the model would read it."""
        async with admitted_request(state, request, TokenizeRequest, one=True) as (asked, _, caller):
            return await tokens(asked, caller)

    async def tokens(asked: TokenizeRequest, caller: Caller) -> Response:
        if (asked.prompt is None) == (asked.messages is None):
            raise ApiError(400, "give either prompt or messages", param="prompt")
        if asked.messages is not None:
            messages = [message.model_dump(exclude_none=True) for message in asked.messages]
            tools = [tool.model_dump(exclude_none=True) for tool in asked.tools or ()] or None
            options = asked.chat_template_kwargs or {}
            ids = await state.tokenizing(lambda lane: lane.template.render(messages, tools=tools, options=options).ids, caller)
        else:
            text, special = asked.prompt or "", asked.add_special_tokens is not False
            ids = await state.tokenizing(lambda lane: tokens_of(lane.tokenizer, text, special), caller)
        body: dict[str, Any] = {"count": len(ids), "max_model_len": state.engine.context, "tokens": ids}
        if asked.return_token_strs:
            body["token_strs"] = [state.texts.text(token) for token in ids]
        return json_response(body)

    @app.post(
        "/detokenize",
        response_model=Text,
        responses=body_errors(),
        openapi_extra=reads(DetokenizeRequest, EXAMPLE_DETOKENIZE),
        tags=["tokens"],
    )
    async def detokenize(request: Request) -> Response:
        """The text of tokens, special ones too."""
        async with admitted_request(state, request, DetokenizeRequest, one=True) as (asked, _, caller):
            if any(token >= state.engine.vocab_size for token in asked.tokens):
                raise ApiError(400, f"tokens: this model has tokens 0 to {state.engine.vocab_size - 1}", param="tokens")
            text = await state.tokenizing(lambda lane: lane.tokenizer.decode(asked.tokens), caller)
        return json_response({"prompt": text})
