"""/v1/fim/completions: fills in the middle of a text, in Mistral's format, which editors use for Codestral."""

from __future__ import annotations

import time
import uuid
from functools import partial

from fastapi import FastAPI, Request, Response

from ..chat.chat_answers import ChatAnswer, ChatCollector, ChatEncoder
from ..chat.fill_in import fill_in_prompt
from ..chat.intake import admitted_request
from ..chat.replies import StreamReply, WholeReply
from ..openapi import body_errors, events, reads
from ..protocol.chat import ChatCompletion
from ..protocol.fim import EXAMPLE, FimRequest, completion_request
from ..state import ServerState
from .completions import start_completion


def add(app: FastAPI, state: ServerState) -> None:
    @app.post(
        "/v1/fim/completions",
        response_model=ChatCompletion,
        responses=body_errors() | {200: events()},
        openapi_extra=reads(FimRequest, EXAMPLE),
        tags=["generation"],
    )
    async def fim(request: Request) -> Response:
        """Fills a gap in a text, for models trained to do so; the answer has the format of a chat's."""
        async with admitted_request(state, request, FimRequest, one=True) as (body, places, caller):
            text = await state.bodies.working(caller.key, caller.size, partial(completion_request, body))
            gap = await fill_in_prompt(state, body.prompt, body.suffix or "", caller)
            name = f"fim-{uuid.uuid4().hex}"
            started = await start_completion(
                state, text, [gap.ids], caller,
                max_tokens=text.max_tokens, id=name, salt=request.state.salt, stop_token_ids=gap.stops,
            )  # fmt: skip
            head = {
                "id": name, "created": int(time.time()), "model": caller.adapter or state.model_name,
                "system_fingerprint": state.fingerprint,
            }  # fmt: skip
            if body.stream:
                encoder = ChatEncoder(head, [ChatAnswer(None)], None, include_usage=True)
                return StreamReply(state, places.pop_all(), started.answers, encoder)
            collector = ChatCollector(head, [ChatAnswer(None)], None)
            return WholeReply(state, places.pop_all(), started.answers, collector.feed, collector.body)
