"""/v1/batches: files of requests that are answered when the server has time, accessible with the API key that created them."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import FastAPI, Path, Query, Request, Response

from ..chat.replies import json_response
from ..http.problems import ApiError
from ..openapi import body_errors, errors, reads
from ..pool.model_pool import ModelPool
from ..protocol.batches import EXAMPLE, BatchList, BatchObject, CreateBatchRequest, batch_object
from ..protocol.tolerance import parse_body
from ..state import ServerState

_Id = Annotated[str, Path(max_length=256)]


def add(app: FastAPI, state: ServerState | ModelPool) -> None:
    batches = state.batches

    @app.post(
        "/v1/batches",
        response_model=BatchObject,
        responses=body_errors() | errors(507),
        openapi_extra=reads(CreateBatchRequest, EXAMPLE),
        tags=["batches"],
    )
    async def create(request: Request) -> Response:
        """Begins to answer the requests of an uploaded file."""
        if state.draining:  # a server that sleeps accepts batches, and answers them later
            state.check_accepting()
        body, _ = await state.shared.bodies.read(request)
        given, ignored = parse_body(CreateBatchRequest, body, state.settings.strict)
        request.state.ignored_fields.extend(ignored)
        after = given.output_expires_after
        batch = await batches.create(
            request.state.salt, given.input_file_id, given.endpoint, given.completion_window, given.metadata,
            None if after is None else float(after.seconds),
        )  # fmt: skip
        return json_response(batch_object(batch))

    @app.get("/v1/batches", response_model=BatchList, responses=errors(400, 401, 403), tags=["batches"])
    async def listed(
        request: Request,
        limit: Annotated[int, Query(ge=1, le=100)] = 20,
        after: Annotated[str | None, Query(max_length=256)] = None,
    ) -> Response:
        """Lists the batches of this API key."""
        found = batches.of(request.state.salt)[::-1]
        if after is not None:
            places = [i for i, batch in enumerate(found) if batch.id == after]
            if not places:
                raise ApiError(400, "after: there is no such batch", param="after")
            found = found[places[0] + 1 :]
        data = [batch_object(batch) for batch in found[:limit]]
        ends: dict[str, Any] = {"first_id": data[0]["id"] if data else None, "last_id": data[-1]["id"] if data else None}
        return json_response({"object": "list", "data": data, **ends, "has_more": len(found) > limit})

    @app.get("/v1/batches/{batch_id}", response_model=BatchObject, responses=errors(400, 401, 403, 404), tags=["batches"])
    async def one(request: Request, batch_id: _Id) -> Response:
        """Describes one batch."""
        return json_response(batch_object(batches.get(request.state.salt, batch_id)))

    @app.post(
        "/v1/batches/{batch_id}/cancel",
        response_model=BatchObject,
        responses=errors(400, 401, 403, 404, 409),
        tags=["batches"],
    )
    async def cancel(request: Request, batch_id: _Id) -> Response:
        """Cancels a batch. Its files have the answers that there are."""
        batch = batches.get(request.state.salt, batch_id)
        await batches.cancel(batch)
        return json_response(batch_object(batch))
