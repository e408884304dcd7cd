"""Passes requests to the application of the model they name, in the body's `model` or `name`, or in the query's `model`."""

from __future__ import annotations

from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.types import Receive, Scope, Send

from ..http.caller import cancel_on_disconnect
from .model_pool import ModelPool


class Dispatcher:
    """An ASGI application, to be mounted below the middleware that checks keys. The body is read here; `BodyReader` returns it
    to the model's route."""

    def __init__(self, pool: ModelPool) -> None:
        self._pool = pool

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        pool, request, size = self._pool, Request(scope, receive), 0
        pool.check_accepting()
        name: Any = request.query_params.get("model")
        if request.method == "POST":
            body, size = request.state.body = await pool.shared.bodies.read(request)
            name = body.get("model") or body.get("name")  # the latter in /api/show of Ollama's older clients
        if request.method != "POST" and name is None and not pool.has_default:  # such as /favicon.ico: it loads nothing
            raise HTTPException(404)
        model = await pool.find(name if isinstance(name, str) else None)
        using = pool.using(model, request.state.client, size, pool.deadline(request.state.arrived))
        if request.method == "POST":
            async with cancel_on_disconnect(request):
                loaded = await using.__aenter__()
        else:
            loaded = await using.__aenter__()
        try:
            await loaded.routes(scope, receive, send)
        finally:
            await using.__aexit__(None, None, None)
