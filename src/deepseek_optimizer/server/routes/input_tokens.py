"""/v1/chat/completions/input_tokens and /v1/responses/input_tokens: count the tokens of a prompt, without generating a text."""

from __future__ import annotations

from fastapi import FastAPI, Request, Response

from ..chat.chat_setup import ChatSpec
from ..chat.intake import admitted_request
from ..chat.old_functions import with_tools
from ..chat.pictures import prepare_chat_for_counting
from ..chat.replies import json_response
from ..http.caller import Caller
from ..openapi import body_errors, reads
from ..protocol.chat import EXAMPLE, ChatRequest
from ..protocol.input_tokens import InputTokens
from ..protocol.responses import EXAMPLE as EXAMPLE_RESPONSE
from ..protocol.responses import ResponsesRequest
from ..state import ServerState
from . import chat, responses


def add(app: FastAPI, state: ServerState) -> None:
    @app.post(
        "/v1/chat/completions/input_tokens",
        response_model=InputTokens,
        responses=body_errors(),
        openapi_extra=reads(ChatRequest, EXAMPLE),
        tags=["tokens"],
    )
    async def chat_tokens(request: Request) -> Response:
        """Counts the tokens of a chat's prompt. The body is that of /v1/chat/completions."""
        async with admitted_request(state, request, ChatRequest, one=True) as (body, _, caller):
            chat.check(body)
            spec = chat.chat_spec(with_tools(body), state.settings.prefill_assistant)
            return json_response(
                {"object": "chat.completion.input_tokens", "input_tokens": await counted(spec, request, caller)}
            )

    @app.post(
        "/v1/responses/input_tokens",
        response_model=InputTokens,
        responses=body_errors(),
        openapi_extra=reads(ResponsesRequest, EXAMPLE_RESPONSE),
        tags=["tokens"],
    )
    async def response_tokens(request: Request) -> Response:
        """Counts the tokens of a response's input. The body is that of /v1/responses."""
        async with admitted_request(state, request, ResponsesRequest, one=True) as (body, _, caller):
            if body.previous_response_id is not None:
                body, caller = await responses.with_history(state, body, request.state.salt, caller)
            spec = responses.chat_spec(body)
            return json_response({"object": "response.input_tokens", "input_tokens": await counted(spec, request, caller)})

    async def counted(spec: ChatSpec, request: Request, caller: Caller) -> int:
        return len((await prepare_chat_for_counting(state, spec, request.state.salt, caller)).ids)
