"""/v1/responses: continues a conversation, in OpenAI's newer protocol."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

from fastapi import FastAPI, Request, Response

from ...engine.request import Request as EngineRequest
from ...engine.request import SamplingParams
from ..chat.chat_setup import ChatSpec, check_choice
from ..chat.forms import Form
from ..chat.intake import admitted_request
from ..chat.replies import StreamReply, WholeReply, json_response
from ..chat.response_answers import ResponseCollector, ResponseEncoder, new_response
from ..chat.response_record import ResponseRecord, conversation_items, input_items
from ..chat.telemetry import streamed_with_telemetry, wanted_telemetry, with_telemetry
from ..document_chats.chats import prepare_any_chat
from ..http.caller import Caller
from ..http.problems import ApiError
from ..openapi import body_errors, events, reads
from ..protocol.responses import (
    EXAMPLE,
    AllowedFunctionTools,
    InputCall,
    InputCallOutput,
    InputContent,
    InputFile,
    InputImage,
    InputMessage,
    InputText,
    JsonObject,
    MessageContent,
    NamedFunctionTool,
    ResponseObject,
    ResponsesRequest,
    SchemaFormat,
)
from ..state import ServerState


def add(app: FastAPI, state: ServerState) -> None:
    @app.post(
        "/v1/responses",
        response_model=ResponseObject,
        responses=body_errors() | {200: events()},
        openapi_extra=reads(ResponsesRequest, EXAMPLE),
        tags=["generation"],
    )
    async def responses(request: Request) -> Response:
        """Answers a conversation, and stores the response unless `store` is false."""
        async with admitted_request(state, request, ResponsesRequest, one=True) as (body, places, caller):
            check(body)
            salt, given = request.state.salt, body
            if body.previous_response_id is not None:
                body, caller = await with_history(state, body, salt, caller)
            chat = chat_spec(body)
            max_tokens, form = body.max_output_tokens, form_of(body)
            prepared = await prepare_any_chat(state, chat, max_tokens, salt, places, caller)
            wants_logprobs = "message.output_text.logprobs" in (body.include or ())
            prepared.check_fields(tools=body.tools and chat.choice != "none", text=form, include=wants_logprobs)
            one_call = body.parallel_tool_calls is False
            grammar = await prepared.grammar(form, not one_call, caller)
            values: dict[str, Any] = {**prepared.sampling}
            for name in ("temperature", "top_p", "min_p", "seed"):
                if (value := getattr(body, name)) is not None:
                    values[name] = value
            if body.top_k is not None:
                values["top_k"] = max(body.top_k, 0)
            params = SamplingParams(
                **values,
                max_tokens=max_tokens,
                logprobs=(body.top_logprobs or 0) if wants_logprobs else None,
                grammar=grammar,
                skip_special_tokens=not prepared.keep_special,
            )
            head = new_response(caller.adapter or state.model_name, _echo(given, params))
            progress = bool(body.stream and body.return_progress) and not chat.has_files
            sequence = EngineRequest(
                prepared.ids, params, id=head["id"], salt=salt, client=caller.key,
                deadline=caller.deadline, priority=body.priority or 0, pinned=prepared.pinned,
                adapter=caller.adapter, progress=progress, pictures=prepared.pictures,
                quality=body.quality, min_quality=body.min_quality,
            )  # fmt: skip
            answers, [answer] = prepared.submit([sequence], one_call)
            texts, dropped = state.texts if wants_logprobs else None, prepared.dropped
            record = ResponseRecord(state, head, input_items(given), salt, caller) if head["store"] else None
            if body.stream:
                encoder = ResponseEncoder(head, answer, texts, dropped)
                store = partial(record.put, encoder.body) if record else None
                timed = streamed_with_telemetry(encoder, wanted_telemetry(body, progress), 1)
                return StreamReply(state, places.pop_all(), answers, timed, before_end=store)
            collector = ResponseCollector(head, answer, texts, dropped)
            if record is not None and body.background:
                try:
                    return json_response(await record.start(collector, answers[0], places))
                except BaseException:
                    answers[0].cancel()
                    raise
            store = partial(record.put, collector.body) if record else None
            whole = with_telemetry(collector, wanted_telemetry(body, False))
            return WholeReply(state, places.pop_all(), answers, whole.feed, whole.body, before_end=store)


def check(body: ResponsesRequest) -> None:
    """Checks fields that depend on each other.

    Raises:
        ApiError: 400, fields contradict each other.
    """
    if body.background and body.store is False:
        raise ApiError(400, "background can only be used when `store` is true", param="background")
    if body.background and body.stream:
        raise ApiError(400, "background: not with stream; get /v1/responses/{id} until it is complete", param="background")


async def with_history(
    state: ServerState, body: ResponsesRequest, salt: str, caller: Caller
) -> tuple[ResponsesRequest, Caller]:
    """A request whose input begins with that of the stored conversation, and the caller with the size of both.

    Raises:
        ApiError: the conversation is not stored or too long; others see `ResponseStore.conversation`.
    """
    rows = await state.responses.conversation(salt, str(body.previous_response_id), caller)
    size = caller.size + sum(len(row.input) + len(row.body) for row in rows)

    def whole() -> ResponsesRequest:
        return body.model_copy(update={"input": conversation_items(rows, body)})

    return await state.bodies.working(caller.key, size, whole), replace(caller, size=size)


def chat_spec(body: ResponsesRequest) -> ChatSpec:
    """Converts a request to a chat.

    Raises:
        ApiError: 400, a function that must be called does not exist.
    """
    tools = []
    for tool in body.tools or ():
        function = tool.model_dump(exclude_none=True, exclude={"type", "strict"})
        tools.append({"type": "function", "function": function})
    wanted = body.tool_choice or "auto"
    named, allowed = isinstance(wanted, NamedFunctionTool), None
    if isinstance(wanted, AllowedFunctionTools):
        allowed, choice = frozenset(tool.name for tool in wanted.tools), str(wanted.mode)
    else:
        choice = wanted.name if isinstance(wanted, NamedFunctionTool) else wanted
    check_choice(tools, choice, named, allowed)
    return ChatSpec(
        messages=chat_messages(body),
        tools=tools,
        choice=choice,
        named=named,
        allowed=allowed,
        several=body.parallel_tool_calls,
        effort=body.reasoning.effort if body.reasoning else None,
        options=body.chat_template_kwargs or {},
    )


def chat_messages(body: ResponsesRequest) -> list[dict[str, Any]]:
    """Converts input items to messages of a chat. Reasoning, text and calls of one turn of the model become one message."""
    messages: list[dict[str, Any]] = []
    if body.instructions is not None:
        messages.append({"role": "system", "content": body.instructions})
    if isinstance(body.input, str):
        return [*messages, {"role": "user", "content": body.input}]
    turn: dict[str, Any] | None = None  # of the assistant, while its items follow each other
    for item in body.input:
        if isinstance(item, InputMessage) and item.role != "assistant":
            messages.append({"role": item.role, "content": _content(item.content)})
            turn = None
        elif isinstance(item, InputCallOutput):
            messages.append({"role": "tool", "tool_call_id": item.call_id, "content": _text(item.output)})
            turn = None
        else:
            if turn is None or (isinstance(item, InputMessage) and turn["content"]):
                turn = {"role": "assistant", "content": ""}
                messages.append(turn)
            if isinstance(item, InputMessage):
                turn["content"] = _content(item.content)
            elif isinstance(item, InputCall):
                function = {"name": item.name, "arguments": item.arguments}
                turn.setdefault("tool_calls", []).append({"id": item.call_id, "type": "function", "function": function})
            elif item.content:
                turn["reasoning_content"] = turn.get("reasoning_content", "") + "".join(part.text for part in item.content)
    return messages


def _content(content: MessageContent) -> str | list[dict[str, Any]]:
    """Content in the format of the chat API: a list of parts if there are files or pictures, and a string otherwise."""
    if isinstance(content, str) or all(isinstance(part, InputText) for part in content):
        return _text(content)
    parts: list[dict[str, Any]] = []
    for part in content:
        if isinstance(part, InputFile):
            file = part.model_dump(exclude_none=True, include={"file_id", "file_data", "filename"})
            parts.append({"type": "file", "file": file})
        elif isinstance(part, InputImage):
            parts.append({"type": "image_url", "image_url": {"url": part.image_url}})
        else:
            parts.append({"type": "text", "text": part.text})
    return parts


def _text(content: InputContent | MessageContent) -> str:
    return content if isinstance(content, str) else "\n".join(part.text for part in content if isinstance(part, InputText))


def form_of(body: ResponsesRequest) -> Form | None:
    """The form that the answer's text must have; None: any."""
    wanted = body.text.format if body.text else None
    if isinstance(wanted, SchemaFormat):
        return Form("json_schema", wanted.schema_)
    return Form("json_object") if isinstance(wanted, JsonObject) else None


def _echo(body: ResponsesRequest, params: SamplingParams) -> dict[str, Any]:
    """The fields of the request that the response repeats."""
    wanted = body.text.format if body.text else None
    tool_choice = body.tool_choice or "auto"
    return {
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "background": bool(body.background),
        "previous_response_id": body.previous_response_id,
        "store": body.store is not False,
        "metadata": body.metadata if isinstance(body.metadata, dict) else {},
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "reasoning": {"effort": body.reasoning.effort if body.reasoning else None, "summary": None},
        "temperature": params.temperature,
        "text": {"format": wanted.model_dump(by_alias=True, exclude_none=True) if wanted else {"type": "text"}},
        "tool_choice": tool_choice if isinstance(tool_choice, str) else tool_choice.model_dump(),
        "tools": [{"strict": None, "parameters": None, **tool.model_dump(exclude_none=True)} for tool in body.tools or ()],
        "top_logprobs": body.top_logprobs or 0,
        "top_p": params.top_p,
    }
