"""/v1/completions: continues a text."""

from __future__ import annotations

import time
import uuid
from dataclasses import replace
from typing import Any

from fastapi import FastAPI, Request, Response

from ..chat.completion_answers import CompletionCollector, CompletionEncoder
from ..chat.fill_in import fill_in_prompt
from ..chat.grammars import compiled, form_of
from ..chat.intake import admitted_request
from ..chat.prompts import text_prompts
from ..chat.replies import StreamReply, WholeReply
from ..http.caller import Caller
from ..http.problems import ApiError
from ..openapi import body_errors, events, reads
from ..protocol.completions import EXAMPLE, Completion, CompletionRequest
from ..protocol.sampling import requests_for
from ..state import ServerState
from ..tokens.tokenizing import Lane

_DEFAULT_TOKENS = 16  # OpenAI's default


def add(app: FastAPI, state: ServerState) -> None:
    @app.post(
        "/v1/completions",
        response_model=Completion,
        responses=body_errors() | {200: events()},
        openapi_extra=reads(CompletionRequest, EXAMPLE),
        tags=["generation"],
    )
    async def completions(request: Request) -> Response:
        """Continues a text, without the model's chat template."""
        async with admitted_request(state, request, CompletionRequest) as (body, places, caller):
            check(body)
            n = body.n or 1
            name = f"cmpl-{uuid.uuid4().hex}"
            stops: tuple[int, ...] = ()
            if body.suffix:
                gap = await fill_in_prompt(state, str(body.prompt), body.suffix, caller)
                prompts, stops = [gap.ids], gap.stops
            else:
                prompts = await text_prompts(state, body.prompt, body.add_special_tokens is not False, caller, "prompt")
            echoes = [""] * (len(prompts) * n)
            if body.echo:
                decoded = await state.tokenizing(lambda lane: [echo(lane, ids) for ids in prompts], caller)
                given = [body.prompt] if isinstance(body.prompt, str) else body.prompt
                texts = given if isinstance(given[0], str) else decoded
                echoes = [str(text) for text in texts for _ in range(n)]
            answers = await start_completion(
                state, body, prompts, caller, max_tokens=body.max_tokens or _DEFAULT_TOKENS, id=name, salt=request.state.salt,
                stop_token_ids=stops,
            )  # fmt: skip
            head = {"id": name, "created": int(time.time()), "model": state.model_name}
            token_texts = None if body.logprobs is None else state.texts
            if body.stream:
                usage = bool(body.stream_options and body.stream_options.include_usage)
                encoder = CompletionEncoder(head, echoes, n, usage, token_texts, body.logprobs)
                return StreamReply(state, places.pop_all(), answers, encoder)
            collector = CompletionCollector(head, echoes, n, token_texts, body.logprobs)
            return WholeReply(state, places.pop_all(), answers, collector.feed, collector.body)

    def echo(lane: Lane, ids: list[int]) -> str:
        if max(ids) >= state.engine.vocab_size:
            raise ApiError(400, "prompt: contains a token id that this model does not have", param="prompt")
        return str(lane.tokenizer.decode(ids))


async def start_completion(
    state: ServerState,
    body: CompletionRequest,
    prompts: list[list[int]],
    caller: Caller,
    *,
    max_tokens: int | None,
    id: str,
    salt: str,
    stop_token_ids: tuple[int, ...] = (),
) -> list[Any]:
    """Submits texts to continue to the engine. All protocols with texts use it.

    Args:
        state: the server's.
        body: the request in OpenAI's format.
        prompts: token ids.
        caller: who sent the request.
        max_tokens: maximum number of new tokens; None: until the context is full.
        id: of the API request.
        salt: of the API key.
        stop_token_ids: tokens that end the text, besides those of the body.

    Returns: the engine's answers, `n` for each prompt.

    Raises:
        ApiError, RequestError, WorkerLostError, EngineDeadError: see `compiled` and `ServerState.submit`.
    """
    grammar = await compiled(state, form_of(body), caller)
    params = body.params(
        state.settings.sampling,
        max_tokens=max_tokens,
        logprobs=body.logprobs,
        grammar=grammar,
    )
    if stop_token_ids:
        params = replace(params, stop_token_ids=(*params.stop_token_ids, *stop_token_ids))
    requests = requests_for(
        prompts,
        params,
        body.n or 1,
        id=id,
        salt=salt,
        client=caller.key,
        deadline=caller.deadline,
        priority=body.priority,
    )
    return state.submit(requests)


def check(body: CompletionRequest) -> None:
    """Checks fields that depend on each other.

    Raises:
        ApiError: 400, fields contradict each other.
    """
    if body.best_of is not None and body.best_of != (body.n or 1):
        raise ApiError(400, "best_of: must equal n, since all answers are returned", param="best_of")
    if body.suffix and not isinstance(body.prompt, str):
        raise ApiError(400, "suffix: requires a single text as prompt", param="suffix")
    if body.echo and body.logprobs is not None:
        raise ApiError(400, "echo: not supported with logprobs, which are only of new tokens", param="echo")
    if body.stream_options is not None and not body.stream:
        raise ApiError(400, "stream_options: requires stream", param="stream_options")
