"""/v1/models, /version and /load of a server with several models, and llama-server's /models/load and /models/unload."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import FastAPI, Path, Request, Response

from ..chat.replies import json_response
from ..http.problems import ApiError
from ..openapi import body_errors, errors, reads
from ..pool.model_pool import ModelPool
from ..pool.pooled_model import PooledModel
from ..protocol.models import EXAMPLE_MODEL_NAME, Done, ModelNameRequest, PooledModelCard, PooledModelList
from ..protocol.operations import Load
from ..protocol.tolerance import parse_body
from . import models, operations


def add(app: FastAPI, pool: ModelPool) -> None:
    def card(name: str, model: PooledModel) -> dict[str, Any]:
        if model.loaded is not None:
            return {**models.card(model.loaded.state), **model.card()}
        return {"id": name, "object": "model", "created": pool.created, "owned_by": "deepseek-optimizer",
                "max_model_len": model.file.context, **model.card()}  # fmt: skip

    async def listed() -> Response:
        """Lists the models that a request's `model` may name, and whether they are loaded."""
        await pool.refresh()
        return json_response({"object": "list", "data": [card(name, model) for name, model in sorted(pool.models.items())]})

    for path in ("/v1/models", "/models"):
        app.get(path, response_model=PooledModelList, responses=errors(401, 403), tags=["models"])(listed)

    @app.get("/v1/models/{model:path}", response_model=PooledModelCard, responses=errors(401, 403, 404), tags=["models"])
    async def one(model: Annotated[str, Path()]) -> Response:
        """Describes one model. Its name may contain slashes."""
        found = await pool.find(model)
        return json_response(card(found.file.name, found))

    operations.add_version(app)

    @app.get("/load", response_model=Load, responses=errors(401, 403), tags=["status"])
    async def server_load() -> Response:
        """The number of requests in the server, for load balancers: those of all models, and those that wait for a model to be
        loaded, in `queues`."""
        states = [model.loaded.state for model in pool.loaded if model.loaded is not None]
        body = operations.load_of(states, [*pool.shared.queues, *(queue for state in states for queue in state.queues)])
        body["queues"]["models"] = {"running": 0, "waiting": pool.waiting}
        return json_response(body)

    async def named(request: Request) -> PooledModel:
        pool.check_accepting()
        body, _ = await pool.shared.bodies.read(request)
        parsed, ignored = parse_body(ModelNameRequest, body, pool.settings.strict)
        request.state.ignored_fields.extend(ignored)
        return await pool.find(parsed.model)

    @app.post(
        "/models/load",
        response_model=Done,
        responses=body_errors(),
        openapi_extra=reads(ModelNameRequest, EXAMPLE_MODEL_NAME),
        tags=["models"],
    )
    async def load(request: Request) -> Response:
        """Begins to load a model; /v1/models says when it is loaded."""
        pool.load(await named(request))
        return json_response({"success": True})

    @app.post(
        "/models/unload",
        response_model=Done,
        responses=body_errors(),
        openapi_extra=reads(ModelNameRequest, EXAMPLE_MODEL_NAME),
        tags=["models"],
    )
    async def unload(request: Request) -> Response:
        """Begins to unload a model: when the requests that use it have ended."""
        model = await named(request)
        if model.loaded is None:
            raise ApiError(400, "model: is not loaded", param="model")
        pool.unload(model)
        return json_response({"success": True})
