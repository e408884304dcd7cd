"""/v1/messages and /v1/messages/count_tokens: Anthropic's Messages API."""

from __future__ import annotations

import uuid
from functools import partial

from fastapi import FastAPI, Request, Response

from ..chat.intake import admitted_request
from ..chat.message_answers import MessageCollector, MessageEncoder, Thoughts
from ..chat.pictures import prepare_chat_for_counting
from ..chat.replies import StreamReply, WholeReply, json_response
from ..http.caller import Caller
from ..openapi import body_errors, events, reads
from ..protocol.anthropic.requests import EXAMPLE, EXAMPLE_COUNT, CountTokensRequest, MessagesRequest
from ..protocol.anthropic.responses import AnthropicError, AnthropicMessage, TokenCount
from ..protocol.anthropic.to_chat import chat_request
from ..protocol.chat import ChatRequest
from ..state import ServerState
from .chat import chat_spec, start_chat


def add(app: FastAPI, state: ServerState) -> None:
    @app.post(
        "/v1/messages",
        response_model=AnthropicMessage,
        responses=body_errors(AnthropicError) | {200: events()},
        openapi_extra=reads(MessagesRequest, EXAMPLE),
        tags=["anthropic"],
    )
    async def messages(request: Request) -> Response:
        """Answers a conversation in the format of Anthropic's Messages API."""
        async with admitted_request(state, request, MessagesRequest, one=True) as (body, places, caller):
            name = f"msg_{uuid.uuid4().hex}"
            converted = await convert(body, caller)
            chat = await start_chat(state, converted, places, caller, id=name, salt=request.state.salt)
            head, [answer] = {"id": name, "model": state.model_name}, chat.parsed
            headers = [(b"request-id", f"req_{uuid.uuid4().hex}".encode())]
            if body.stream:
                encoder = MessageEncoder(head, answer, thoughts(body), chat.dropped)
                return StreamReply(state, places.pop_all(), chat.answers, encoder, headers=headers)
            collector = MessageCollector(head, answer, thoughts(body), chat.dropped)
            return WholeReply(state, places.pop_all(), chat.answers, collector.feed, collector.body, headers=headers)

    @app.post(
        "/v1/messages/count_tokens",
        response_model=TokenCount,
        responses=body_errors(AnthropicError),
        openapi_extra=reads(CountTokensRequest, EXAMPLE_COUNT),
        tags=["anthropic"],
    )
    async def count_tokens(request: Request) -> Response:
        """Counts the tokens of a conversation's prompt."""
        async with admitted_request(state, request, CountTokensRequest, one=True) as (body, _, caller):
            spec = chat_spec(await convert(body, caller))
            prepared = await prepare_chat_for_counting(state, spec, request.state.salt, caller)
            return json_response({"input_tokens": len(prepared.ids)})

    async def convert(body: CountTokensRequest, caller: Caller) -> ChatRequest:
        switch = False
        if body.thinking is not None and body.thinking.type == "disabled":
            tools = bool(body.tools)
            variables = await state.tokenizing(lambda lane: lane.template.variables(tools), caller, 0)
            switch = not variables.isdisjoint(("reasoning_effort", "enable_thinking", "thinking"))
        return await state.bodies.working(caller.key, caller.size, partial(chat_request, body, switch))


def thoughts(body: MessagesRequest) -> Thoughts:
    """Whether the answer contains the model's reasoning."""
    if body.thinking is None:
        return "shown"
    if body.thinking.type == "disabled":
        return "hidden"
    return "omitted" if body.thinking.display == "omitted" else "shown"
