"""/api/chat: answers a chat in Ollama's format."""

from __future__ import annotations

import uuid
from contextlib import ExitStack
from functools import partial
from typing import Any

from fastapi import FastAPI, Request, Response

from ...chat.chat_answers import ChatAnswer
from ...chat.intake import admitted_request
from ...chat.ollama_answers import OllamaWriter, timestamp
from ...chat.replies import LINES, StreamReply, WholeReply, json_response
from ...http.caller import Caller
from ...openapi import body_errors, lines, reads
from ...protocol.chat import ChatRequest
from ...protocol.ollama.requests import EXAMPLE_CHAT, OllamaChatRequest, OllamaGenerateRequest
from ...protocol.ollama.responses import OllamaChat, OllamaError
from ...protocol.ollama.to_openai import chat_request, is_load
from ...state import ServerState
from ..chat import start_chat

Generation = OllamaChatRequest | OllamaGenerateRequest


def add(app: FastAPI, state: ServerState) -> None:
    @app.post(
        "/api/chat",
        response_model=OllamaChat,
        responses=body_errors(OllamaError) | {200: lines()},
        openapi_extra=reads(OllamaChatRequest, EXAMPLE_CHAT),
        tags=["ollama"],
    )
    async def chat(request: Request) -> Response:
        """Answers a chat in the format of Ollama's API: a JSON object per output, unless `stream` is false."""
        async with admitted_request(state, request, OllamaChatRequest, one=True) as (body, places, caller):
            if is_load(body):
                return json_response(loaded(state, body) | {"message": {"role": "assistant", "content": ""}})
            switch = await has_switch(state, body, bool(body.tools), caller)
            converted = await state.bodies.working(caller.key, caller.size, partial(chat_request, body, switch))
            return await answer_chat(state, body, converted, places, caller, request.state.salt)


async def answer_chat(
    state: ServerState,
    body: Generation,
    chat: ChatRequest,
    places: ExitStack,
    caller: Caller,
    salt: str,
) -> Response:
    """The answer to /api/chat or /api/generate.

    Args:
        state: the server's.
        body: the request.
        chat: the same in OpenAI's format.
        places: in the engine's queue.
        caller: who sent the request.
        salt: of the API key.
    """
    started = await start_chat(state, chat, places, caller, id=f"ollama-{uuid.uuid4().hex}", salt=salt)
    [answer] = started.parsed
    return reply(state, body, places, started.answers, answer)


def reply(
    state: ServerState,
    body: Generation,
    places: ExitStack,
    answers: list[Any],
    answer: ChatAnswer,
) -> Response:
    """Sends an answer, as a stream unless the request says otherwise."""
    is_chat, thoughts = isinstance(body, OllamaChatRequest), body.think is not False
    writer = OllamaWriter(state.model_name, answer, chat=is_chat, thoughts=thoughts)
    if body.stream is False:
        return WholeReply(state, places.pop_all(), answers, writer.feed, writer.body)
    return StreamReply(state, places.pop_all(), answers, writer, LINES)


async def has_switch(state: ServerState, body: Generation, tools: bool, caller: Caller) -> bool:
    """Whether the chat template can turn reasoning on and off, if the request asks for either."""
    if body.think is None:
        return False
    variables = await state.tokenizing(lambda lane: lane.template.variables(tools), caller, 0)
    return not variables.isdisjoint(("reasoning_effort", "enable_thinking", "thinking"))


def loaded(state: ServerState, body: Generation) -> dict[str, Any]:
    """The answer to a request without a prompt, by which clients load and unload models: the model stays loaded."""
    reason = "unload" if body.keep_alive in (0, "0") else "load"
    return {"model": state.model_name, "created_at": timestamp(), "done": True, "done_reason": reason}
