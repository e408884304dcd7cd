"""/slots: the places of the batch and what they do, as llama-server lists them. Read-only, and without texts of requests."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI, Response

from ....engine.running import RequestProgress
from ...chat.replies import json_response
from ...http.problems import not_enabled
from ...openapi import errors
from ...protocol.llama_server import Slot
from ...state import ServerState


def add(app: FastAPI, state: ServerState) -> None:
    @app.get("/slots", response_model=list[Slot], responses=errors(401, 403, 501), tags=["llama-server"])
    async def slots() -> Response:
        """The places of the batch. A request may have another place in the next list; `id_task` stays the same."""
        if not state.settings.slots:
            raise not_enabled("slots are not listed by this server, which was started with --no-slots")
        count, running = state.engine.max_running, state.engine.running_requests()
        places: list[RequestProgress | None] = [*running, *[None] * (count - len(running))]
        return json_response([_slot(state, index, one) for index, one in enumerate(places)])


def _slot(state: ServerState, index: int, request: RequestProgress | None) -> dict[str, Any]:
    decoded = 0 if request is None else request.generated
    remaining = -1 if request is None else request.max_tokens - request.generated
    return {
        "id": index,
        "n_ctx": state.engine.context,
        "speculative": False,
        "is_processing": request is not None,
        "id_task": -1 if request is None else request.number,
        "n_prompt_tokens": 0 if request is None else request.prompt_tokens,
        "next_token": [{"has_next_token": request is not None, "n_remain": remaining, "n_decoded": decoded}],
    }
