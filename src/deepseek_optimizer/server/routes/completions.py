"""/v1/completions: continues a text."""

from __future__ import annotations

import time
import uuid
from dataclasses import dataclass, replace
from typing import Any

from fastapi import FastAPI, Request, Response

from ..chat.beams import beam_start
from ..chat.completion_answers import CompletionCollector, CompletionEncoder
from ..chat.fill_in import fill_in_prompt
from ..chat.forms import form_of
from ..chat.grammars import compiled
from ..chat.intake import admitted_request
from ..chat.prompts import text_prompts, truncated
from ..chat.replies import StreamReply, WholeReply
from ..chat.reports import reported, wanted_reports
from ..chat.telemetry import streamed_with_telemetry, wanted_telemetry, with_telemetry
from ..chat.words import sampler_words
from ..http.caller import Caller
from ..http.problems import ApiError
from ..openapi import body_errors, events, reads
from ..protocol.chat import usage_in_stream
from ..protocol.completions import EXAMPLE, Completion, CompletionRequest
from ..protocol.sampling import requests_for
from ..state import ServerState
from ..tokens.token_text import TokenIdTexts, TokenTexts
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
            n, returned = body.best_of or body.n or 1, body.n or 1
            max_tokens = _DEFAULT_TOKENS if body.max_tokens is None else body.max_tokens
            stops: tuple[int, ...] = ()
            if body.suffix:
                gap = await fill_in_prompt(state, str(body.prompt), body.suffix, caller)
                prompts, stops = [gap.ids], gap.stops
            else:
                special, cut = body.add_special_tokens is not False, body.truncate_prompt_tokens
                prompts = await text_prompts(state, body.prompt, special, caller, "prompt", whole=cut is None)
                prompts = truncated(state, prompts, cut, body.truncation_side, max_tokens)
            echoes = [""] * (len(prompts) * n)
            if body.echo:
                decoded = await state.tokenizing(lambda lane: [echo(lane, ids) for ids in prompts], caller)
                given = [body.prompt] if isinstance(body.prompt, str) else body.prompt
                texts = given if isinstance(given[0], str) and body.truncate_prompt_tokens is None else decoded
                echoes = [str(text) for text in texts for _ in range(n)]
            name = f"cmpl-{uuid.uuid4().hex}"
            started = await start_completion(
                state, body, prompts, caller, max_tokens=max_tokens,
                id=name, salt=request.state.salt, stop_token_ids=stops, echoes=echoes,
            )  # fmt: skip
            answers, reports = started.answers, started.reports
            head = {
                "id": name, "created": int(time.time()), "model": caller.adapter or state.model_name,
                "system_fingerprint": state.fingerprint,
            }  # fmt: skip
            token_texts = None if body.logprobs is None else started.texts
            if body.stream:
                last, every = usage_in_stream(body.stream_options)
                encoder = CompletionEncoder(head, echoes, n, last, token_texts, every, reports)
                timed = streamed_with_telemetry(encoder, wanted_telemetry(body, True), len(answers))
                return StreamReply(state, places.pop_all(), answers, timed)
            whole = CompletionCollector(head, echoes, n, token_texts, reports, returned)
            collector = with_telemetry(whole, wanted_telemetry(body, False))
            return WholeReply(state, places.pop_all(), answers, collector.feed, collector.body)

    def echo(lane: Lane, ids: list[int]) -> str:
        if max(ids) >= state.engine.vocab_size:
            raise ApiError(400, "prompt: contains a token id that is out of vocabulary", param="prompt")
        return str(lane.tokenizer.decode(ids))


@dataclass(frozen=True)
class StartedCompletion:
    """Texts that were submitted to the engine.

    Attributes:
        answers: the engine's, `best_of` or `n` for each prompt.
        texts: of the model's tokens.
        reports: of prompt and tokens; None: none were requested.
    """

    answers: list[Any]
    texts: TokenTexts
    reports: Any


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
    sampled_logprobs: bool = False,
    echoes: list[str] | None = None,
) -> StartedCompletion:
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
        sampled_logprobs: see `SamplingParams`.
        echoes: text before each answer; None: there is none.

    Raises:
        ApiError, RequestError, WorkerLostError, EngineDeadError: see `compiled` and `ServerState.submit`.
    """
    n, returned = body.best_of or body.n or 1, body.n or 1
    grammar = await compiled(state, form_of(body), caller)
    params = body.params(
        state.settings.sampling,
        max_tokens=max_tokens,
        logprobs=0 if body.logprobs is None and n > returned else body.logprobs,
        grammar=grammar,
        words=await sampler_words(state, body, caller),
    )
    if sampled_logprobs:
        params = replace(params, sampled_logprobs=True)
    if stop_token_ids:
        params = replace(params, stop_token_ids=(*params.stop_token_ids, *stop_token_ids))
    wanted = wanted_reports(body, prompts, n, bool(body.stream), body.logprobs if body.echo else None)
    requests = requests_for(
        prompts,
        params,
        n,
        id=id,
        salt=salt,
        client=caller.key,
        deadline=caller.deadline,
        priority=body.priority,
        adapter=caller.adapter,
        cache_salt=body.cache_salt,
        prompt_logprobs=wanted.prompt_logprobs,
        progress=bool(body.stream and body.return_progress),
        quality=body.quality,
        min_quality=body.min_quality,
    )
    if body.n_predict is not None:
        requests = [state.fitted(request) for request in requests]
    texts = TokenIdTexts(state.texts) if body.return_tokens_as_token_ids else state.texts
    answers = (beam_start(state, body, n, caller) or state.submit)(requests)
    answers, reports = reported(state, answers, requests, wanted, caller, texts, echoes or [""] * len(answers))
    return StartedCompletion(answers, texts, reports)


def check(body: CompletionRequest) -> None:
    """Checks fields that depend on each other.

    Raises:
        ApiError: 400, fields contradict each other.
    """
    if body.best_of is not None and body.best_of < (body.n or 1):
        raise ApiError(400, "best_of: must not be less than n", param="best_of")
    if body.best_of is not None and body.best_of > (body.n or 1) and (body.stream or body.use_beam_search):
        raise ApiError(400, "best_of: must equal n with stream or use_beam_search", param="best_of")
    if body.suffix and not isinstance(body.prompt, str):
        raise ApiError(400, "suffix: requires a single text as prompt", param="suffix")
    if body.stream_options is not None and not body.stream:
        raise ApiError(400, "stream_options: requires stream", param="stream_options")
