"""/generate, /generate_stream and POST /: continue a text, in the format of Hugging Face's TGI."""

from __future__ import annotations

import uuid
from functools import partial

from fastapi import FastAPI, Request, Response

from ..chat.intake import admitted_request
from ..chat.prompts import text_prompts
from ..chat.replies import StreamReply, WholeReply
from ..chat.tgi_answers import TgiAnswer
from ..openapi import body_errors, events, reads
from ..protocol.tgi import EXAMPLE, Parameters, TgiError, TgiRequest, TgiText, completion_request
from ..state import ServerState
from .completions import start_completion


def add(app: FastAPI, state: ServerState) -> None:
    special = frozenset(state.tokenizer.all_special_ids)

    @app.post(
        "/generate",
        response_model=TgiText,
        responses=body_errors(TgiError) | {200: events()},
        openapi_extra=reads(TgiRequest, EXAMPLE),
        tags=["tgi"],
    )
    async def generate(request: Request) -> Response:
        """Continues a text in the format of TGI; with `stream`, as events."""
        return await answer(request, None)

    @app.post(
        "/generate_stream",
        response_class=Response,
        responses=body_errors(TgiError) | {200: events()},
        openapi_extra=reads(TgiRequest, EXAMPLE),
        tags=["tgi"],
    )
    async def generate_stream(request: Request) -> Response:
        """Continues a text in the format of TGI, as an event per token."""
        return await answer(request, True)

    @app.post("/", include_in_schema=False)
    async def root(request: Request) -> Response:
        """The address that huggingface_hub's `text_generation` uses, which is the server's."""
        return await answer(request, None)

    async def answer(request: Request, stream: bool | None) -> Response:
        async with admitted_request(state, request, TgiRequest, one=True) as (body, places, caller):
            given, stream = body.parameters or Parameters.model_validate({}), bool(body.stream) if stream is None else stream
            details = stream or bool(given.details)
            text = await state.bodies.working(caller.key, caller.size, partial(completion_request, body, details))
            [prompt] = await text_prompts(state, body.inputs, True, caller, "inputs")
            prompt = prompt[-given.truncate :] if given.truncate else prompt
            started = await start_completion(
                state, text, [prompt], caller,
                max_tokens=text.max_tokens, id=f"tgi-{uuid.uuid4().hex}", salt=request.state.salt,
            )  # fmt: skip
            echo = body.inputs if given.return_full_text else ""
            writer = TgiAnswer(
                state.texts, special, echo, details=details, seed=given.seed, top=bool(given.top_n_tokens)
            )  # fmt: skip
            if stream:
                return StreamReply(state, places.pop_all(), started.answers, writer)
            return WholeReply(state, places.pop_all(), started.answers, writer.feed, writer.body)
