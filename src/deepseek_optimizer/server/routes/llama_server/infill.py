"""/infill: fills in the middle of a text, in llama-server's format."""

from __future__ import annotations

from fastapi import FastAPI, Request, Response

from ...chat.fill_in import fill_in_prompt
from ...chat.intake import admitted_request
from ...openapi import body_errors, events, reads
from ...protocol.llama_server import EXAMPLE_INFILL, InfillRequest, NativeCompletion
from ...state import ServerState
from .completion import answer


def add(app: FastAPI, state: ServerState) -> None:
    @app.post(
        "/infill",
        response_model=NativeCompletion,
        responses=body_errors() | {200: events()},
        openapi_extra=reads(InfillRequest, EXAMPLE_INFILL),
        tags=["llama-server"],
    )
    async def infill(request: Request) -> Response:
        """Fills a gap between two texts, for models trained to do so."""
        async with admitted_request(state, request, InfillRequest, one=True) as (body, places, caller):
            files = [(file.filename or "tmp", file.text) for file in body.input_extra or ()]
            prompt = await fill_in_prompt(
                state, body.input_prefix, body.input_suffix, caller, start=body.prompt, files=files, field="input_suffix"
            )
            return await answer(
                state, body, [prompt.ids], places, caller, salt=request.state.salt, stops=prompt.stops
            )  # fmt: skip
