"""The ASGI application: middleware and routes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from prometheus_client import CollectorRegistry
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware

from ..errors import excerpt
from ..longdoc.recognized import PageReader
from . import openapi
from .http.error_formats import error_response
from .http.guard import Guard, HostGuard
from .http.ignored_fields import HEADER
from .http.metrics import HttpMetrics
from .http.origins import OriginCheck
from .http.page_files import PageFile, page_files
from .http.paths import RootPath, path_of
from .http.problems import ApiError, problem
from .http.tracing import Tracer, Tracing
from .idle_sleep import sleep_when_idle
from .protocol.adapters import LoadAdapterRequest, UnloadAdapterRequest
from .protocol.anthropic.requests import CountTokensRequest, MessagesRequest
from .protocol.batches import CreateBatchRequest
from .protocol.chat import ChatRequest
from .protocol.completions import CompletionRequest
from .protocol.embeddings import EmbeddingRequest, NativeEmbeddingRequest
from .protocol.fim import FimRequest
from .protocol.llama_server import ApplyTemplateRequest, InfillRequest, NativeCompletionRequest
from .protocol.models import DetokenizeRequest, TokenizeRequest
from .protocol.ollama.requests import (
    OllamaChatRequest,
    OllamaEmbeddingsRequest,
    OllamaEmbedRequest,
    OllamaGenerateRequest,
    OllamaPullRequest,
    OllamaShowRequest,
)
from .protocol.responses import ResponsesRequest
from .protocol.scores import ClassifyRequest, PoolingRequest, RerankRequest, ScoreRequest
from .protocol.tgi import TgiRequest
from .routes import (
    adapters,
    batches,
    chat,
    classify,
    completions,
    embeddings,
    encoder_only,
    files,
    fim,
    input_tokens,
    llama_server,
    messages,
    models,
    ollama,
    operations,
    page,
    props,
    responses,
    scores,
    status,
    stored_responses,
    tgi,
    tokenizer_info,
    tokens,
)
from .settings import ServerSettings
from .state import ServerState

_SWEEP_SECONDS = 60.0
_ABOUT = """OpenAI's API, served by deepseek-optimizer. OpenAI's fields that have no effect here (user, metadata, store and the
like) are accepted and ignored."""
_TOLERANT = " Unknown fields are ignored too; the response header X-Ignored-Fields names them."
_STRICT = " An unknown field is an error, and so is a number in quotes."


def create_app(
    engine: Any, settings: ServerSettings | None = None, tracer: Tracer | None = None, ocr: PageReader | None = None
) -> FastAPI:
    """Creates the ASGI application for an `AsyncEngine`, which starts and ends with it.

    Args:
        engine: an `AsyncEngine` that has not been started.
        settings: None: the defaults.
        tracer: exports traces; it is closed with the application.
        ocr: reads scanned pages of uploaded files; None: they are reported.

    Returns: the application; its `state.server` is the `ServerState`.
    """
    settings = settings or ServerSettings()
    state = ServerState(engine, settings, ocr=ocr)
    assets = page_files()

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        await engine.start()
        tasks = [asyncio.ensure_future(_sweep(state))]
        if state.generates:
            state.batches.start(app, lambda: state.accepting, max(1, engine.max_running // 2), state.bodies.max_bytes)
        if settings.idle_sleep is not None:
            tasks.append(asyncio.ensure_future(sleep_when_idle(state, settings.idle_sleep)))
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            await state.batches.stop()
            await engine.close()
            await state.responses.finish()
            state.close()
            if tracer is not None:
                await asyncio.to_thread(tracer.close)

    if tracer is not None:
        engine.observe(tracer)
    app = new_app(settings, engine.registry, lifespan, assets, tracer)
    app.state.server = state
    add_routes(app, state)
    if state.generates and settings.page:
        page.add(app, assets)
    elif state.generates:
        page.leave_out(app, page.DISABLED)
    bodies: list[type[BaseModel]] = [
        ChatRequest,
        CompletionRequest,
        ResponsesRequest,
        EmbeddingRequest,
        NativeEmbeddingRequest,
        RerankRequest,
        ScoreRequest,
        ClassifyRequest,
        PoolingRequest,
        TokenizeRequest,
        DetokenizeRequest,
        MessagesRequest,
        CountTokensRequest,
        OllamaChatRequest,
        OllamaGenerateRequest,
        OllamaEmbedRequest,
        OllamaEmbeddingsRequest,
        OllamaShowRequest,
        OllamaPullRequest,
        NativeCompletionRequest,
        InfillRequest,
        FimRequest,
        ApplyTemplateRequest,
        TgiRequest,
        CreateBatchRequest,
    ]
    if settings.allow_lora_loading:
        bodies += [LoadAdapterRequest, UnloadAdapterRequest]
    openapi.install(app, bodies, bool(settings.keys), settings.strict)
    return app


def add_routes(app: FastAPI, state: ServerState) -> None:
    """Adds the routes of a model."""
    generating = (
        chat,
        completions,
        fim,
        responses,
        input_tokens,
        stored_responses,
        files,
        batches,
        props,
        messages,
        ollama.chat,
        ollama.generate,
        llama_server,
        tgi,
    )
    for route in (
        embeddings,
        llama_server.embedding,
        scores,
        classify,
        models,
        ollama.embed,
        ollama.models,
        tokens,
        tokenizer_info,
        status,
        operations,
    ):
        route.add(app, state)
    if state.generates:
        for route in generating:
            route.add(app, state)
        adapters.add(app, state)
    else:
        encoder_only.add(app, state, generating)
    add_paths_without_v1(app)


def new_app(
    settings: ServerSettings,
    registry: CollectorRegistry,
    lifespan: Callable[[FastAPI], AbstractAsyncContextManager[None]],
    assets: dict[str, PageFile],
    tracer: Tracer | None = None,
) -> FastAPI:
    """Creates an application with the middleware of every server, and without routes.

    Args:
        settings: the server's.
        registry: for the metrics of HTTP requests.
        lifespan: starts and ends what the routes use.
        assets: the chat page's files, which need no API key.
        tracer: exports traces.
    """
    open_paths = {"/", "/health", "/ready", *page.paths(assets)}
    middleware = [Middleware(RootPath, path=settings.root_path)] if settings.root_path else []
    middleware.append(Middleware(HostGuard, settings=settings))
    if settings.allow_origins:
        middleware.append(
            Middleware(
                OriginCheck,
                allow_origins=settings.allow_origins,
                allow_headers=["Authorization", "Content-Type", "X-Api-Key", "Anthropic-Version", "Anthropic-Beta"],
                expose_headers=["Retry-After", "X-Request-Id", HEADER],
            )
        )
    if tracer is not None:
        middleware.append(Middleware(Tracing, tracer=tracer, skip=frozenset({"/health", "/ready", "/metrics"})))
    middleware.append(Middleware(Guard, settings=settings, metrics=HttpMetrics(registry), open_paths=open_paths))
    return FastAPI(
        title="deepseek-optimizer",
        description=_ABOUT + (_STRICT if settings.strict else _TOLERANT),
        docs_url=None,  # it would load scripts from another host
        redoc_url=None,
        redirect_slashes=False,
        middleware=middleware,
        exception_handlers={HTTPException: _http_error, RequestValidationError: _wrong_parameter},
        lifespan=lifespan,
    )


def add_paths_without_v1(app: FastAPI) -> None:
    """Serves each path under /v1 without that prefix too, as llama-server does, for clients whose base URL lacks it."""
    routes = [route for route in app.routes if isinstance(route, APIRoute)]
    taken = {(route.path, method) for route in routes for method in route.methods or ()}
    for route in routes:
        path, methods = route.path.removeprefix("/v1"), route.methods or set()
        if path != route.path and not any((path, method) in taken for method in methods):
            app.add_api_route(path, route.endpoint, methods=sorted(methods), include_in_schema=False)


async def _sweep(state: ServerState) -> None:
    """Deletes expired files periodically, and checks whether the model's files were replaced."""
    while True:
        await asyncio.sleep(_SWEEP_SECONDS)
        state.engine.log_replaced_files()
        state.files.sweep()
        state.documents.sweep()
        await asyncio.to_thread(state.responses.sweep)
        await state.batches.sweep()


async def _wrong_parameter(request: Request, error: Exception) -> Response:
    """Converts FastAPI's error about a path or query parameter."""
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    name = excerpt(str(first["loc"][-1]))
    return error_response(ApiError(400, f"{name}: {first['msg']}", param=name), path_of(request.scope))


async def _http_error(request: Request, error: Exception) -> Response:
    """Converts Starlette's errors, such as an unknown path or an unsupported method."""
    api_error = problem(error)
    assert api_error is not None
    return error_response(api_error, path_of(request.scope))
