"""/completion: continues a text, in llama-server's format."""

from __future__ import annotations

import uuid
from contextlib import ExitStack
from functools import partial
from typing import Any

from fastapi import FastAPI, Request, Response

from ....errors import RequestError
from ...chat.intake import admitted_request
from ...chat.native_answers import NativeAnswers
from ...chat.prompts import tokens_of
from ...chat.replies import StreamReply, WholeReply
from ...http.caller import Caller
from ...http.problems import ApiError
from ...openapi import body_errors, events, reads
from ...protocol.llama_server import (
    EXAMPLE,
    InfillRequest,
    NativeCompletion,
    NativeCompletionRequest,
    completion_request,
)
from ...state import ServerState
from ...tokens.tokenizing import Lane
from ..completions import start_completion

Prompts = list[str | list[int | str]]


def add(app: FastAPI, state: ServerState) -> None:
    @app.post(
        "/completion",
        response_model=NativeCompletion | list[NativeCompletion],
        responses=body_errors() | {200: events()},
        openapi_extra=reads(NativeCompletionRequest, EXAMPLE),
        tags=["llama-server"],
    )
    async def completion(request: Request) -> Response:
        """Continues a text in the format of llama-server, without the model's chat template."""
        async with admitted_request(state, request, NativeCompletionRequest) as (body, places, caller):
            prompts, several = _prompts(body.prompt)
            for prompt in prompts:
                state.prompt_size.check((part for part in prompt if isinstance(part, str)), "prompt")
            ids = await state.tokenizing(lambda lane: [_ids(state, lane, prompt) for prompt in prompts], caller)
            return await answer(state, body, ids, places, caller, salt=request.state.salt, several=several)


async def answer(
    state: ServerState,
    body: NativeCompletionRequest | InfillRequest,
    prompts: list[list[int]],
    places: ExitStack,
    caller: Caller,
    *,
    salt: str,
    several: bool = False,
    stops: tuple[int, ...] = (),
) -> Response:
    """The answer to /completion or /infill.

    Args:
        state: the server's.
        body: the request.
        prompts: token ids.
        places: in the engine's queue.
        caller: who sent the request.
        salt: of the API key.
        several: whether the request has a list of prompts.
        stops: tokens that end the text, besides the end of text.
    """
    text = await state.bodies.working(caller.key, caller.size, partial(completion_request, body))
    if text.n not in (None, 1):
        raise ApiError(400, "n: must be 1; send the prompt several times", param="n")
    started = await start_completion(
        state, text, prompts, caller, max_tokens=text.max_tokens, id=f"cmpl-{uuid.uuid4().hex}", salt=salt, stop_token_ids=stops
    )
    texts = await state.tokenizing(lambda lane: [str(lane.tokenizer.decode(ids)) for ids in prompts], caller)
    writer = NativeAnswers(
        state.model_name,
        texts,
        started.answers[0].request.sampling,
        None if text.logprobs is None else state.texts,
        with_tokens=bool(body.return_tokens),
        several=several,
    )
    if body.stream:
        return StreamReply(state, places.pop_all(), started.answers, writer)
    return WholeReply(state, places.pop_all(), started.answers, writer.feed, writer.body)


def _prompts(prompt: Any) -> tuple[Prompts, bool]:
    """The prompts of a request as lists of texts and token ids, and whether it has a list of prompts."""
    if isinstance(prompt, str):
        return [[prompt]], False
    if any(isinstance(part, int) for part in prompt):
        return [prompt], False
    return [[one] if isinstance(one, str) else one for one in prompt], True


def _ids(state: ServerState, lane: Lane, parts: Any) -> list[int]:
    ids: list[int] = []
    for number, part in enumerate(parts):
        if isinstance(part, str):
            ids += tokens_of(lane.tokenizer, part, special=number == 0)
        elif part >= state.engine.vocab_size:
            raise RequestError("prompt", "contains a token id that this model does not have")
        else:
            ids.append(part)
    if not ids:
        raise RequestError("prompt", "must have at least one token")
    return ids
