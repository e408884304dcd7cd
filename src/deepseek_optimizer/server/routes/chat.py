"""/v1/chat/completions: continues a chat."""

from __future__ import annotations

import time
import uuid
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI, Request, Response

from ..chat.chat_answers import ChatAnswer, ChatCollector, ChatEncoder
from ..chat.chat_setup import ChatSpec, check_choice
from ..chat.grammars import form_of
from ..chat.intake import admitted_request
from ..chat.prepared import prepare_chat
from ..chat.replies import StreamReply, WholeReply
from ..document_chats.chats import prepare_chat_with_files
from ..http.caller import Caller
from ..http.problems import ApiError
from ..openapi import body_errors, events, reads
from ..protocol.chat import EXAMPLE, ChatCompletion, ChatRequest
from ..protocol.messages import NamedTool
from ..protocol.sampling import requests_for
from ..state import ServerState
from ..tokens.token_text import TokenTexts


def add(app: FastAPI, state: ServerState) -> None:
    @app.post(
        "/v1/chat/completions",
        response_model=ChatCompletion,
        responses=body_errors() | {200: events()},
        openapi_extra=reads(ChatRequest, EXAMPLE),
        tags=["generation"],
    )
    async def chat_completions(request: Request) -> Response:
        """Answers a chat, using the model's chat template."""
        async with admitted_request(state, request, ChatRequest) as (body, places, caller):
            check(body)
            name = f"chatcmpl-{uuid.uuid4().hex}"
            chat = await start_chat(state, body, places, caller, id=name, salt=request.state.salt)
            head = {"id": name, "created": int(time.time()), "model": state.model_name}
            if body.stream:
                usage = bool(body.stream_options and body.stream_options.include_usage)
                encoder = ChatEncoder(head, chat.parsed, chat.texts, usage, chat.dropped)
                return StreamReply(state, places.pop_all(), chat.answers, encoder)
            collector = ChatCollector(head, chat.parsed, chat.texts, chat.dropped)
            return WholeReply(state, places.pop_all(), chat.answers, collector.feed, collector.body)


@dataclass(frozen=True)
class StartedChat:
    """A chat that was submitted to the engine.

    Attributes:
        answers: the engine's, one for each requested answer.
        parsed: a parser for each.
        texts: of the model's tokens; None: no log probabilities.
        dropped: tokens that were dropped from the prompt.
    """

    answers: list[Any]
    parsed: list[ChatAnswer]
    texts: TokenTexts | None
    dropped: int


async def start_chat(
    state: ServerState, body: ChatRequest, places: ExitStack, caller: Caller, *, id: str, salt: str
) -> StartedChat:
    """Prepares a chat and submits it to the engine. All protocols with chats use it.

    Args:
        state: the server's.
        body: the chat in OpenAI's format.
        places: in the engine's queue.
        caller: who sent the request.
        id: of the API request.
        salt: of the API key.

    Raises:
        ApiError, RequestError, WorkerLostError, EngineDeadError: see `prepare_chat`, `chat_grammar` and `PreparedChat.submit`.
    """
    n = body.n or 1
    chat = chat_spec(body)
    form = form_of(body)
    max_tokens = body.max_completion_tokens or body.max_tokens
    if chat.has_files:
        prepared = await prepare_chat_with_files(state, chat, max_tokens, salt, places, caller)
    else:
        prepared = await prepare_chat(state, chat, caller)
    prepared.check_fields(n=n > 1, tools=body.tools and chat.choice != "none", logprobs=body.logprobs, response_format=form)
    one_call = body.parallel_tool_calls is False
    grammar = await prepared.grammar(form, not one_call, caller)
    top = (body.top_logprobs or 0) if body.logprobs else None
    params = body.params(
        state.settings.sampling,
        max_tokens=max_tokens,
        logprobs=top,
        grammar=grammar,
        keep_special=prepared.keep_special,
    )
    requests = requests_for(
        [prepared.ids], params, n, id=id, salt=salt, client=caller.key,
        deadline=caller.deadline, priority=body.priority, pinned=prepared.pinned,
    )  # fmt: skip
    answers, parsed = prepared.submit(requests, one_call)
    return StartedChat(answers, parsed, state.texts if body.logprobs else None, prepared.dropped)


def check(body: ChatRequest) -> None:
    """Checks fields that depend on each other.

    Raises:
        ApiError: 400, fields contradict each other.
    """
    if body.top_logprobs is not None and not body.logprobs:
        raise ApiError(400, "top_logprobs: requires logprobs", param="top_logprobs")
    if body.stream_options is not None and not body.stream:
        raise ApiError(400, "stream_options: requires stream", param="stream_options")
    if body.continue_final_message and body.add_generation_prompt:
        raise ApiError(
            400, "continue_final_message: not with add_generation_prompt; leave one out", param="continue_final_message"
        )


def chat_spec(body: ChatRequest) -> ChatSpec:
    """Extracts the chat from a request.

    Raises:
        ApiError: 400, a tool that must be called does not exist.
    """
    tools = [tool.model_dump(exclude_none=True, exclude={"function": {"strict"}}) for tool in body.tools or ()]
    wanted = body.tool_choice or "auto"
    named = isinstance(wanted, NamedTool)
    choice = wanted.function.name if isinstance(wanted, NamedTool) else wanted
    check_choice(tools, choice, named)
    return ChatSpec(
        messages=[message.model_dump(exclude_none=True) for message in body.messages],
        tools=tools,
        choice=choice,
        named=named,
        effort=body.reasoning_effort,
        options=body.chat_template_kwargs or {},
        skip_special=body.skip_special_tokens is not False,
        add_generation_prompt=body.add_generation_prompt is not False,
        continue_final=bool(body.continue_final_message),
    )
