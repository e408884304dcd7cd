"""/api/tags, /api/ps and /api/version of a server with several models. Requests for one model, such as /api/show,
go to that model."""

from __future__ import annotations

from fastapi import FastAPI, Response

from ...chat.replies import json_response
from ...openapi import errors
from ...pool.model_pool import ModelPool
from ...protocol.ollama.responses import OllamaError, OllamaModels, OllamaProcesses
from .models import add_version, card, running_card


def add(app: FastAPI, pool: ModelPool) -> None:
    @app.get("/api/tags", response_model=OllamaModels, responses=errors(401, 403, model=OllamaError), tags=["ollama"])
    async def tags() -> Response:
        """Lists the models that a request may name."""
        await pool.refresh()
        return json_response({"models": [card(name, pool.created, m.file.bytes) for name, m in sorted(pool.models.items())]})

    @app.get("/api/ps", response_model=OllamaProcesses, responses=errors(401, 403, model=OllamaError), tags=["ollama"])
    async def running() -> Response:
        """Lists the loaded models."""
        loaded = [model.loaded for model in pool.loaded if model.loaded is not None]
        return json_response({"models": [running_card(model.state, model.bytes) for model in loaded]})

    add_version(app)
