"""What an encoder cannot do: the paths that generate text answer with an error that says what to use instead."""

from __future__ import annotations

from collections.abc import Iterable
from types import ModuleType

from fastapi import FastAPI
from fastapi.routing import APIRoute

from ..http.problems import ApiError
from ..state import ServerState


def add(app: FastAPI, state: ServerState, modules: Iterable[ModuleType]) -> None:
    """Adds the paths of route modules, each with the same error.

    Args:
        app: gets the paths.
        state: the server's.
        modules: of `routes/`, which need a model that generates text.
    """
    unused = FastAPI()
    for module in modules:
        module.add(unused, state)
    uses = "/v1/embeddings or /v1/rerank" if state.engine.classifier is None else "/v1/rerank, /v1/score or /classify"
    message = (
        f"the model {state.model_name} is an encoder, which cannot generate text; use {uses}, or serve a language model instead"
    )

    async def refuse() -> None:
        raise ApiError(404, message, param="model", code="model_cannot_generate")

    for route in unused.routes:
        if isinstance(route, APIRoute):
            app.add_api_route(route.path, refuse, methods=list(route.methods), include_in_schema=False)
