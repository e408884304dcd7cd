"""/v1/completions: continues a text."""

from __future__ import annotations

import time
import uuid

from fastapi import FastAPI, Request, Response

from ..chat.completion_answers import CompletionCollector, CompletionEncoder
from ..chat.forms import form_of
from ..chat.grammars import compiled
from ..chat.intake import admitted_request
from ..chat.prompts import text_prompts
from ..chat.replies import StreamReply, WholeReply
from ..http.problems import ApiError
from ..openapi import body_errors, events, reads
from ..protocol.chat import StreamOptions
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
            grammar = await compiled(state, form_of(body), caller)
            params = body.params(
                state.settings.sampling,
                max_tokens=body.max_tokens or _DEFAULT_TOKENS,
                logprobs=body.logprobs,
                grammar=grammar,
            )
            special = body.add_special_tokens is not False
            prompts = await text_prompts(state, body.prompt, special, caller, "prompt")
            echoes = [""] * (len(prompts) * n)
            if body.echo:
                decoded = await state.tokenizing(lambda lane: [echo(lane, ids) for ids in prompts], caller)
                given = [body.prompt] if isinstance(body.prompt, str) else body.prompt
                texts = given if isinstance(given[0], str) else decoded
                echoes = [str(text) for text in texts for _ in range(n)]
            name = f"cmpl-{uuid.uuid4().hex}"
            head = {"id": name, "created": int(time.time()), "model": state.model_name}
            requests = requests_for(
                prompts,
                params,
                n,
                id=name,
                salt=request.state.salt,
                client=caller.key,
                deadline=caller.deadline,
                priority=body.priority,
            )
            answers = state.submit(requests)
            token_texts = None if body.logprobs is None else state.texts
            if body.stream:
                usage = body.stream_options or StreamOptions()
                encoder = CompletionEncoder(
                    head, echoes, n, bool(usage.include_usage), token_texts, body.logprobs, usage.continuous
                )
                return StreamReply(state, places.pop_all(), answers, encoder)
            collector = CompletionCollector(head, echoes, n, token_texts, body.logprobs)
            return WholeReply(state, places.pop_all(), answers, collector.feed, collector.body)

    def echo(lane: Lane, ids: list[int]) -> str:
        if max(ids) >= state.engine.vocab_size:
            raise ApiError(400, "prompt: contains a token id that this model does not have", param="prompt")
        return str(lane.tokenizer.decode(ids))


def check(body: CompletionRequest) -> None:
    """Checks fields that depend on each other.

    Raises:
        ApiError: 400, fields contradict each other.
    """
    if body.best_of is not None and body.best_of != (body.n or 1):
        raise ApiError(400, "best_of: must equal n, since all answers are returned", param="best_of")
    if body.echo and body.logprobs is not None:
        raise ApiError(400, "echo: not supported with logprobs, which are only of new tokens", param="echo")
    if body.stream_options is not None and not body.stream:
        raise ApiError(400, "stream_options: requires stream", param="stream_options")
