"""The ASGI application of a server with several models: its own routes, and an application for each loaded model."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Response
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest

from . import openapi
from .app import add_paths_without_v1, add_routes, new_app
from .http.page_files import page_files
from .pool.dispatcher import Dispatcher
from .pool.model_list import ModelFile
from .pool.model_pool import ModelPool, Open
from .pool.pool_metrics import PoolCollector
from .pool.pooled_model import LoadedModel
from .protocol.batches import CreateBatchRequest
from .protocol.models import ModelNameRequest
from .routes import batches, files, ollama, page, stored_responses
from .routes import pool as pool_routes
from .routes.status import check_metrics
from .settings import ServerSettings
from .shared import Shared
from .state import ServerState

_SWEEP_SECONDS = 60.0
_BATCH_REQUESTS = 16  # of batches in flight


def opener(load: Callable[[ModelFile], tuple[Any, ServerSettings, int]]) -> Open:
    """The `open_model` of a `ModelPool`.

    Args:
        load: returns an `AsyncEngine` that has not been started, the settings for it, and the bytes of memory that it takes.
    """

    def open_model(file: ModelFile, shared: Shared) -> LoadedModel:
        engine, settings, size = load(file)
        state = ServerState(engine, settings, shared)
        app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None, redirect_slashes=False)
        add_routes(app, state)
        return LoadedModel(state, app.router, size)

    return open_model


def create_pool_app(pool: ModelPool) -> FastAPI:
    """Creates the ASGI application for a pool, which starts and ends with it.

    Args:
        pool: the models, none of which is loaded yet.

    Returns: the application; its `state.server` is the pool.
    """
    assets, registry = page_files(), CollectorRegistry()

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        pool.start()
        pool.batches.start(app, lambda: not pool.draining, _BATCH_REQUESTS, pool.shared.bodies.max_bytes)
        sweeping = asyncio.ensure_future(_sweep(pool))
        try:
            yield
        finally:
            sweeping.cancel()
            await pool.batches.stop()
            await pool.close()

    app = new_app(pool.settings, registry, lifespan, assets)
    registry.register(PoolCollector(pool))
    app.state.server = pool
    pool_routes.add(app, pool)
    ollama.pool.add(app, pool)
    files.add(app, pool)
    batches.add(app, pool)
    stored_responses.add(app, pool)
    _add_status(app, pool, registry)
    add_paths_without_v1(app)
    if pool.settings.page:
        page.add(app, assets)
    else:
        page.leave_out(app, page.DISABLED)
    openapi.install(app, [ModelNameRequest, CreateBatchRequest], bool(pool.settings.keys), pool.settings.strict)
    app.mount("/", Dispatcher(pool))
    return app


def _add_status(app: FastAPI, pool: ModelPool, registry: CollectorRegistry) -> None:
    @app.get("/health", tags=["status"])
    async def health() -> Response:
        """Whether the server runs: 503 after the engine of a model has stopped. Models are loaded when requests name them."""
        return JSONResponse({"status": "ok" if pool.alive else "dead"}, 200 if pool.alive else 503)

    @app.get("/ready", tags=["status"])
    async def ready() -> Response:
        """Whether the server accepts requests: 503 while it is shutting down, after the engine of a model has stopped, and
        until the pinned models are loaded."""
        pinned = [model for model in pool.models.values() if model.pinned and not model.ready]
        status = "draining" if pool.draining else "dead" if not pool.alive else pinned[0].status if pinned else "ok"
        return JSONResponse({"status": status}, 200 if status == "ok" else 503)

    @app.get("/metrics", response_class=Response, tags=["status"])
    async def metrics() -> Response:
        """Prometheus metrics of the server, its loaded models and their status."""
        check_metrics(pool.settings)
        return Response(generate_latest(registry), headers={"Content-Type": CONTENT_TYPE_LATEST})


async def _sweep(pool: ModelPool) -> None:
    """Deletes expired files periodically, and checks whether files of loaded models were replaced."""
    while True:
        await asyncio.sleep(_SWEEP_SECONDS)
        pool.shared.files.sweep()
        await asyncio.to_thread(pool.responses.sweep)
        await pool.batches.sweep()
        for model in pool.loaded:
            if model.loaded is not None:
                model.loaded.state.engine.log_replaced_files()
                model.loaded.state.documents.sweep()
