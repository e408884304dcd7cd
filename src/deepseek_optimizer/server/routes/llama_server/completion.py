"""/completion: continues a text, in llama-server's format. /completions without /v1 is the same if no model is named."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial

from fastapi import FastAPI, Request, Response

from ....errors import RequestError
from ...chat.intake import admitted_request
from ...chat.native_answers import NativeAnswers, NativeOptions
from ...chat.prompts import mixed_ids, tokens_of
from ...chat.replies import StreamReply, WholeReply
from ...http.caller import Caller
from ...http.problems import ApiError
from ...openapi import body_errors, events, reads
from ...protocol.llama_server import (
    EXAMPLE,
    InfillRequest,
    NativeCompletion,
    NativeCompletionRequest,
    bias_texts,
    completion_request,
)
from ...protocol.prompt_parts import Part, prompts_of
from ...state import ServerState
from ...tokens.tokenizing import Lane
from ..completions import start_completion


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
            prompts, several = prompts_of(body.prompt)
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
    biased = bias_texts(body)
    tokens: dict[str, list[int]] = {}
    if biased:
        tokens = await state.tokenizing(
            lambda lane: {text: tokens_of(lane.tokenizer, text, special=False) for text in biased}, caller
        )
    convert = partial(completion_request, body, tokens, state.engine.eos)
    text = await state.bodies.working(caller.key, caller.size, convert)
    if text.n not in (None, 1):
        raise ApiError(400, "n: must be 1; send the prompt several times", param="n")
    sampled = bool(body.post_sampling_probs) and text.logprobs is not None
    started = await start_completion(
        state, text, prompts, caller, max_tokens=text.max_tokens, id=f"cmpl-{uuid.uuid4().hex}", salt=salt,
        stop_token_ids=stops, sampled_logprobs=sampled,
    )  # fmt: skip
    texts = await state.tokenizing(lambda lane: [str(lane.tokenizer.decode(ids)) for ids in prompts], caller)
    options = NativeOptions(
        with_tokens=bool(body.return_tokens),
        several=several,
        timings=bool(body.timings_per_token),
        sampled=sampled,
        ignore_eos=bool(body.ignore_eos),
        stream=bool(body.stream),
        fields=tuple(body.response_fields or ()),
    )
    params = started.answers[0].request.sampling
    writer = NativeAnswers(state.model_name, texts, params, None if text.logprobs is None else state.texts, options)
    if body.stream:
        return StreamReply(state, places.pop_all(), started.answers, writer)
    return WholeReply(state, places.pop_all(), started.answers, writer.feed, writer.body)


def _ids(state: ServerState, lane: Lane, parts: Sequence[Part]) -> list[int]:
    if any(isinstance(part, int) and part >= state.engine.vocab_size for part in parts):
        raise RequestError("prompt", "contains a token id that this model does not have")
    ids = mixed_ids(lane.tokenizer, parts)
    if not ids:
        raise RequestError("prompt", "must have at least one token")
    return ids
