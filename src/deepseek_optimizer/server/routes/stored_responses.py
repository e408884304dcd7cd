"""/v1/responses/{response_id}: responses that are stored, accessible with the API key that created them."""

from __future__ import annotations

import time
from typing import Annotated, Any, Literal

import orjson
from fastapi import FastAPI, Path, Query, Request, Response

from ..chat.replies import json_response
from ..http.caller import Caller
from ..http.problems import ApiError
from ..openapi import errors
from ..pool.model_pool import ModelPool
from ..protocol.responses import DeletedResponse, InputItemList, ResponseObject
from ..state import ServerState

_Id = Annotated[str, Path(max_length=256)]
_ERRORS = errors(400, 401, 403, 404, 429, 503, 504, 507)


def add(app: FastAPI, state: ServerState | ModelPool) -> None:
    def caller_of(request: Request) -> Caller:
        return Caller(request.state.client, 0, state.deadline(time.monotonic()))

    @app.get("/v1/responses/{response_id}", response_model=ResponseObject, responses=_ERRORS, tags=["responses"])
    async def response(request: Request, response_id: _Id, stream: bool = False) -> Response:
        """A stored response."""
        if stream:
            raise ApiError(400, "stream: the events of a response are not stored; get the whole response", param="stream")
        row = await state.responses.get(request.state.salt, response_id, caller_of(request))
        return Response(row.body, media_type="application/json")

    @app.get("/v1/responses/{response_id}/input_items", response_model=InputItemList, responses=_ERRORS, tags=["responses"])
    async def items(
        request: Request,
        response_id: _Id,
        limit: Annotated[int, Query(ge=1, le=100)] = 20,
        order: Literal["asc", "desc"] = "desc",
        after: Annotated[str | None, Query(max_length=256)] = None,
    ) -> Response:
        """The input items of a stored response's request."""
        row = await state.responses.get(request.state.salt, response_id, caller_of(request))
        stored: list[dict[str, Any]] = orjson.loads(row.input)
        if order == "desc":
            stored.reverse()
        if after is not None:
            places = [i for i, item in enumerate(stored) if item["id"] == after]
            if not places:
                raise ApiError(400, "after: there is no such item", param="after")
            stored = stored[places[0] + 1 :]
        data = stored[:limit]
        ends: dict[str, Any] = {"first_id": data[0]["id"] if data else None, "last_id": data[-1]["id"] if data else None}
        return json_response({"object": "list", "data": data, **ends, "has_more": len(stored) > limit})

    @app.delete("/v1/responses/{response_id}", response_model=DeletedResponse, responses=_ERRORS, tags=["responses"])
    async def delete(request: Request, response_id: _Id) -> Response:
        """Deletes a stored response. Conversations that continue it cannot be continued any more."""
        await state.responses.delete(request.state.salt, response_id, caller_of(request))
        return json_response({"id": response_id, "object": "response", "deleted": True})

    @app.post("/v1/responses/{response_id}/cancel", response_model=ResponseObject, responses=_ERRORS, tags=["responses"])
    async def cancel(request: Request, response_id: _Id) -> Response:
        """Cancels a response that is generated in the background."""
        owner, caller = request.state.salt, caller_of(request)
        row = await state.responses.get(owner, response_id, caller)
        if not row.background:
            raise ApiError(400, "Cannot cancel a synchronous response.", param="response_id")
        if await state.responses.background.cancel(owner, response_id):
            row = await state.responses.get(owner, response_id, caller)
        return Response(row.body, media_type="application/json")
