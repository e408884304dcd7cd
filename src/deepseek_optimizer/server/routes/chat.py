"""/v1/chat/completions: continues a chat."""

from __future__ import annotations

import time
import uuid
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI, Request, Response

from ..chat.beams import beam_start
from ..chat.chat_answers import ChatAnswer, ChatCollector, ChatEncoder
from ..chat.chat_setup import ChatSpec, check_choice
from ..chat.forms import form_of
from ..chat.intake import admitted_request
from ..chat.old_functions import FunctionCollector, FunctionEncoder, with_tool_calls, with_tools
from ..chat.replies import StreamReply, WholeReply
from ..chat.reports import reported, wanted_reports
from ..chat.telemetry import Wanted, streamed_with_telemetry, wanted_telemetry, with_telemetry
from ..chat.words import sampler_words
from ..document_chats.chats import prepare_any_chat
from ..http.caller import Caller
from ..http.problems import ApiError
from ..openapi import body_errors, events, reads
from ..protocol.chat import EXAMPLE, ChatCompletion, ChatRequest, usage_in_stream
from ..protocol.messages import AllowedToolsChoice, AssistantMessage, NamedTool
from ..protocol.sampling import requests_for
from ..state import ServerState
from ..tokens.token_text import TokenIdTexts, TokenTexts


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
            body = with_tools(body)
            name = f"chatcmpl-{uuid.uuid4().hex}"
            chat = await start_chat(state, body, places, caller, id=name, salt=request.state.salt)
            head = {
                "id": name, "created": int(time.time()), "model": caller.adapter or state.model_name,
                "system_fingerprint": state.fingerprint,
            }  # fmt: skip
            if body.stream:
                last, every = usage_in_stream(body.stream_options)
                make = ChatEncoder if body.functions is None else FunctionEncoder
                encoder = make(head, chat.parsed, chat.texts, last, chat.dropped, every, chat.reports)
                timed = streamed_with_telemetry(encoder, chat.telemetry, len(chat.answers))
                return StreamReply(state, places.pop_all(), chat.answers, timed)
            collect = ChatCollector if body.functions is None else FunctionCollector
            whole = collect(head, chat.parsed, chat.texts, chat.dropped, chat.reports)
            collector = with_telemetry(whole, chat.telemetry)
            return WholeReply(state, places.pop_all(), chat.answers, collector.feed, collector.body)


@dataclass(frozen=True)
class StartedChat:
    """A chat that was submitted to the engine.

    Attributes:
        answers: the engine's, one for each requested answer.
        parsed: a parser for each.
        texts: of the model's tokens; None: no log probabilities.
        dropped: tokens that were dropped from the prompt.
        reports: of prompt and tokens; None: none were requested.
        telemetry: what else the answer is to report.
    """

    answers: list[Any]
    parsed: list[ChatAnswer]
    texts: TokenTexts | None
    dropped: int
    reports: Any
    telemetry: Wanted


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
        ApiError, RequestError, WorkerLostError, EngineDeadError: see `prepare_any_chat`, `chat_grammar` and
            `PreparedChat.submit`.
    """
    n = body.n or 1
    chat = chat_spec(body, state.settings.prefill_assistant)
    form = form_of(body)
    max_tokens = body.max_completion_tokens or body.max_tokens
    prepared = await prepare_any_chat(state, chat, max_tokens, salt, places, caller)
    prepared.check_fields(
        n=n > 1, tools=body.tools and chat.choice != "none", logprobs=body.logprobs, response_format=form,
        prompt_logprobs=body.prompt_logprobs is not None, return_token_ids=body.return_token_ids,
        use_beam_search=body.use_beam_search,
    )  # fmt: skip
    one_call = body.parallel_tool_calls is False
    grammar = await prepared.grammar(form, not one_call, caller)
    top = (body.top_logprobs or 0) if body.logprobs else None
    params = body.params(
        prepared.sampling,
        max_tokens=max_tokens,
        logprobs=top,
        grammar=grammar,
        keep_special=prepared.keep_special,
        words=await sampler_words(state, body, caller),
    )
    wanted = wanted_reports(body, [prepared.ids], n, bool(body.stream))
    progress = bool(body.stream and body.return_progress) and not chat.has_files
    requests = requests_for(
        [prepared.ids], params, n, id=id, salt=salt, client=caller.key,
        deadline=caller.deadline, priority=body.priority, pinned=prepared.pinned, adapter=caller.adapter,
        cache_salt=body.cache_salt, prompt_logprobs=wanted.prompt_logprobs,
        progress=progress, pictures=prepared.pictures, quality=body.quality, min_quality=body.min_quality,
    )  # fmt: skip
    if body.n_predict is not None:
        requests = [state.fitted(request) for request in requests]
    texts_of_tokens = TokenIdTexts(state.texts) if body.return_tokens_as_token_ids else state.texts
    answers, parsed = prepared.submit(requests, one_call, beam_start(state, body, n, caller))
    for answer in parsed:
        answer.shows_reasoning = body.include_reasoning is not False
    answers, reports = reported(state, answers, requests, wanted, caller, texts_of_tokens)
    telemetry = wanted_telemetry(body, progress, prepared.text if body.verbose else None)
    texts = texts_of_tokens if body.logprobs else None
    return StartedChat(answers, parsed, texts, prepared.dropped, reports, telemetry)


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


def chat_spec(body: ChatRequest, prefill: bool = False) -> ChatSpec:
    """Extracts the chat from a request.

    Args:
        body: the request.
        prefill: continue a last message of the assistant unless the request says otherwise.

    Raises:
        ApiError: 400, a tool that must be called does not exist.
    """
    tools = [tool.model_dump(exclude_none=True, exclude={"function": {"strict"}}) for tool in body.tools or ()]
    wanted = body.tool_choice or "auto"
    named, allowed = isinstance(wanted, NamedTool), None
    if isinstance(wanted, AllowedToolsChoice):
        allowed = frozenset(tool.function.name for tool in wanted.allowed_tools.tools)
        choice: str = wanted.allowed_tools.mode
    else:
        choice = wanted.function.name if isinstance(wanted, NamedTool) else wanted
    check_choice(tools, choice, named, allowed)
    return ChatSpec(
        messages=with_tool_calls([message.model_dump(exclude_none=True) for message in body.messages]),
        tools=tools,
        choice=choice,
        named=named,
        allowed=allowed,
        several=body.parallel_tool_calls,
        effort=body.reasoning_effort,
        options=body.chat_template_kwargs or {},
        skip_special=body.skip_special_tokens is not False,
        add_generation_prompt=body.add_generation_prompt is not False,
        continue_final=_continues(body, prefill),
        cache_salt=body.cache_salt,
    )


def _continues(body: ChatRequest, prefill: bool) -> bool:
    """Whether the last message is continued instead of answered."""
    if body.continue_final_message is not None or body.add_generation_prompt is not None:
        return bool(body.continue_final_message)
    last = body.messages[-1]
    if prefill and isinstance(last, AssistantMessage) and isinstance(body.messages[-2:][0], AssistantMessage):
        if len(body.messages) > 1:
            raise ApiError(400, "messages: two messages of the assistant cannot be continued; join them", param="messages")
    return prefill and isinstance(last, AssistantMessage) and bool(last.content) and not last.tool_calls
