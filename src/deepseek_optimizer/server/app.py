"""The ASGI application: middleware and routes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware

from ..errors import excerpt
from . import openapi
from .http.error_formats import error_response
from .http.guard import Guard, HostGuard
from .http.metrics import HttpMetrics
from .http.page_files import page_files
from .http.paths import path_of
from .http.problems import ApiError, problem
from .protocol.anthropic.requests import CountTokensRequest, MessagesRequest
from .protocol.chat import ChatRequest
from .protocol.completions import CompletionRequest
from .protocol.embeddings import EmbeddingRequest
from .protocol.llama_server import ApplyTemplateRequest, InfillRequest, NativeCompletionRequest
from .protocol.models import DetokenizeRequest, TokenizeRequest
from .protocol.ollama.requests import (
    OllamaChatRequest,
    OllamaEmbeddingsRequest,
    OllamaEmbedRequest,
    OllamaGenerateRequest,
    OllamaShowRequest,
)
from .protocol.responses import ResponsesRequest
from .protocol.tgi import TgiRequest
from .routes import (
    chat,
    completions,
    embeddings,
    files,
    llama_server,
    messages,
    models,
    ollama,
    page,
    responses,
    status,
    stored_responses,
    tgi,
    tokens,
)
from .settings import ServerSettings
from .state import ServerState

_SWEEP_SECONDS = 60.0
_ABOUT = """OpenAI's API, served by deepseek-optimizer. An unsupported field is an error, and so is a number in quotes; OpenAI's
fields that have no effect here (user, metadata, store and the like) are accepted and ignored."""


def create_app(engine: Any, settings: ServerSettings | None = None) -> FastAPI:
    """Creates the ASGI application for an `AsyncEngine`, which starts and ends with it.

    Args:
        engine: an `AsyncEngine` that has not been started.
        settings: None: the defaults.

    Returns: the application; its `state.server` is the `ServerState`.
    """
    settings = settings or ServerSettings()
    state = ServerState(engine, settings)
    assets = page_files()
    open_paths = {"/", "/health", "/ready", *page.paths(assets)}

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        await engine.start()
        sweeping = asyncio.ensure_future(_sweep(state))
        try:
            yield
        finally:
            sweeping.cancel()
            await engine.close()
            await state.responses.finish()
            state.close()

    middleware = [Middleware(HostGuard, settings=settings)]
    if settings.allow_origins:
        middleware.append(
            Middleware(
                CORSMiddleware,
                allow_origins=list(settings.allow_origins),
                allow_methods=["GET", "POST", "DELETE"],
                allow_headers=["Authorization", "Content-Type", "X-Api-Key", "Anthropic-Version", "Anthropic-Beta"],
                expose_headers=["Retry-After"],
            )
        )
    middleware.append(Middleware(Guard, settings=settings, metrics=HttpMetrics(engine.registry), open_paths=open_paths))
    app = FastAPI(
        title="deepseek-optimizer",
        description=_ABOUT,
        docs_url=None,  # it would load scripts from another host
        redoc_url=None,
        redirect_slashes=False,
        middleware=middleware,
        exception_handlers={HTTPException: _http_error, RequestValidationError: _wrong_parameter},
        lifespan=lifespan,
    )
    app.state.server = state
    own = (chat, completions, responses, stored_responses, embeddings, files, models, tokens, status)
    for route in (*own, messages, ollama, llama_server, tgi):
        route.add(app, state)
    page.add(app, assets)
    bodies: list[type[BaseModel]] = [
        ChatRequest,
        CompletionRequest,
        ResponsesRequest,
        EmbeddingRequest,
        TokenizeRequest,
        DetokenizeRequest,
        MessagesRequest,
        CountTokensRequest,
        OllamaChatRequest,
        OllamaGenerateRequest,
        OllamaEmbedRequest,
        OllamaEmbeddingsRequest,
        OllamaShowRequest,
        NativeCompletionRequest,
        InfillRequest,
        ApplyTemplateRequest,
        TgiRequest,
    ]
    openapi.install(app, bodies, bool(settings.keys))
    return app


async def _sweep(state: ServerState) -> None:
    """Deletes expired files periodically, and checks whether the model's files were replaced."""
    while True:
        await asyncio.sleep(_SWEEP_SECONDS)
        state.engine.log_replaced_files()
        state.files.sweep()
        state.documents.sweep()
        await asyncio.to_thread(state.responses.sweep)


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
