"""/v1/completions: a text, continued."""

from __future__ import annotations

import time
import uuid

from fastapi import FastAPI, Request, Response

from ..chat.completion_answers import CompletionCollector, CompletionEncoder
from ..chat.grammars import compiled, form_of
from ..chat.intake import admitted_request
from ..chat.prompts import text_prompts
from ..chat.replies import StreamReply, WholeReply
from ..http.problems import ApiError
from ..openapi import body_errors, events, reads
from ..protocol.completions import EXAMPLE, Completion, CompletionRequest
from ..protocol.sampling import requests_for
from ..state import ServerState
from ..tokens.tokenising import Lane

_DEFAULT_TOKENS = 16  # OpenAI's


def add(app: FastAPI, state: ServerState) -> None:
    @app.post(
        "/v1/completions",
        response_model=Completion,
        responses=body_errors() | {200: events()},
        openapi_extra=reads(CompletionRequest, EXAMPLE),
        tags=["generation"],
    )
    async def completions(request: Request) -> Response:
        """Continues a text as it is, without the model's chat template."""
        async with admitted_request(state, request, CompletionRequest) as (asked, places, caller):
            check(asked)
            n = asked.n or 1
            grammar = await compiled(state, form_of(asked), caller)
            params = asked.params(
                state.settings.sampling,
                max_tokens=asked.max_tokens or _DEFAULT_TOKENS,
                logprobs=asked.logprobs,
                grammar=grammar,
            )
            special = asked.add_special_tokens is not False
            prompts = await text_prompts(state, asked.prompt, special, caller, "prompt")
            echoes = [""] * (len(prompts) * n)
            if asked.echo:
                decoded = await state.tokenizing(lambda lane: [echo(lane, ids) for ids in prompts], caller)
                given = [asked.prompt] if isinstance(asked.prompt, str) else asked.prompt
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
                priority=asked.priority,
            )
            answers = state.submit(requests)
            token_texts = None if asked.logprobs is None else state.texts
            if asked.stream:
                usage = bool(asked.stream_options and asked.stream_options.include_usage)
                encoder = CompletionEncoder(head, echoes, n, usage, token_texts, asked.logprobs)
                return StreamReply(state, places.pop_all(), answers, encoder)
            collector = CompletionCollector(head, echoes, n, token_texts, asked.logprobs)
            return WholeReply(state, places.pop_all(), answers, collector.feed, collector.body)

    def echo(lane: Lane, ids: list[int]) -> str:
        if max(ids) >= state.engine.vocab_size:
            raise ApiError(400, "prompt: has a token that is not of this model", param="prompt")
        return str(lane.tokenizer.decode(ids))


def check(asked: CompletionRequest) -> None:
    """
    Raises:
        ApiError: 400, fields that contradict each other.
    """
    if asked.best_of is not None and asked.best_of != (asked.n or 1):
        raise ApiError(400, "best_of: must be n, since all answers are returned", param="best_of")
    if asked.echo and asked.logprobs is not None:
        raise ApiError(400, "echo: not with logprobs, which are of new tokens alone", param="echo")
    if asked.stream_options is not None and not asked.stream:
        raise ApiError(400, "stream_options: only with stream", param="stream_options")
