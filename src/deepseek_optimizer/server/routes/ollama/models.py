"""/api/tags, /api/ps, /api/show, /api/pull and /api/version: describe the model that is served, in Ollama's format. `pool.py`
has the lists of a server with several models."""

from __future__ import annotations

import hashlib
from typing import Any

from fastapi import FastAPI, Request, Response

from ....errors import RequestError
from ...chat.intake import admitted_request
from ...chat.ollama_answers import timestamp
from ...chat.replies import json_response
from ...openapi import body_errors, errors, lines, reads
from ...protocol.ollama.requests import EXAMPLE_PULL, EXAMPLE_SHOW, OllamaPullRequest, OllamaShowRequest
from ...protocol.ollama.responses import OllamaError, OllamaModels, OllamaProcesses, OllamaPulled, OllamaShow, OllamaVersion
from ...state import ServerState

_VERSION = "0.12.0"  # of Ollama, whose API this is; clients check it
_FILLS_IN = "{{- /* fills a gap between .Prompt and .Suffix */ -}}\n"  # Continue looks for .Suffix to find out
_FOREVER = 4_102_444_800  # January 1, 2100: the model stays loaded


def details() -> dict[str, Any]:
    """`details` of a model."""
    return {"parent_model": "", "format": "safetensors", "family": "", "families": [], "parameter_size": "",
            "quantization_level": ""}  # fmt: skip


def card(model: str, created: int, size: int = 0) -> dict[str, Any]:
    """Describes a model in /api/tags.

    Args:
        model: its name.
        created: time in seconds since the epoch.
        size: bytes of its weights; 0: unknown.
    """
    name = model if ":" in model else f"{model}:latest"
    digest = hashlib.sha256(name.encode()).hexdigest()
    return {"name": name, "model": name, "modified_at": timestamp(created), "size": size, "digest": digest,
            "details": details()}  # fmt: skip


def running_card(state: ServerState, size: int = 0) -> dict[str, Any]:
    """Describes a loaded model in /api/ps."""
    more = {"expires_at": timestamp(_FOREVER), "size_vram": 0, "context_length": state.engine.context}
    return {**card(state.model_name, state.created, size), **more}


def add_version(app: FastAPI) -> None:
    @app.get("/api/version", response_model=OllamaVersion, responses=errors(401, 403, model=OllamaError), tags=["ollama"])
    async def version() -> Response:
        """The version of Ollama's API that this server follows."""
        return json_response({"version": _VERSION})


def add(app: FastAPI, state: ServerState) -> None:
    @app.get("/api/tags", response_model=OllamaModels, responses=errors(401, 403, model=OllamaError), tags=["ollama"])
    async def tags() -> Response:
        """Lists the models that a request may name."""
        return json_response({"models": [card(state.model_name, state.created)]})

    @app.get("/api/ps", response_model=OllamaProcesses, responses=errors(401, 403, model=OllamaError), tags=["ollama"])
    async def running() -> Response:
        """Lists the loaded models."""
        return json_response({"models": [running_card(state)]})

    add_version(app)

    @app.post(
        "/api/show",
        response_model=OllamaShow,
        responses=body_errors(OllamaError),
        openapi_extra=reads(OllamaShowRequest, EXAMPLE_SHOW),
        tags=["ollama"],
    )
    async def show(request: Request) -> Response:
        """Describes a model: its chat template, context and capabilities."""
        async with admitted_request(state, request, OllamaShowRequest, one=True) as (body, _, _caller):
            state.check_model(body.name)
            template, capabilities = "", ["completion" if state.generates else "embedding"]
            capabilities += ["vision"] if state.pictures is not None else []
            try:
                template = state.template.source()
                capabilities += ["tools"]  # with any chat template
                capabilities += ["thinking"] if state.thinks(False) else []
            except RequestError:  # the model has no chat template
                pass
            if state.fill_in is not None:
                capabilities.append("insert")
                template = _FILLS_IN + template
            return json_response(
                {
                    "modelfile": "",
                    "parameters": "\n".join(f"{name} {value}" for name, value in state.settings.sampling.items()),
                    "template": template,
                    "details": details(),
                    "model_info": {"general.architecture": "model", "model.context_length": state.engine.context},
                    "capabilities": capabilities,
                    "modified_at": timestamp(state.created),
                }
            )

    @app.post(
        "/api/pull",
        response_model=OllamaPulled,
        responses=body_errors(OllamaError) | {200: lines()},
        openapi_extra=reads(OllamaPullRequest, EXAMPLE_PULL),
        tags=["ollama"],
    )
    async def pull(request: Request) -> Response:
        """Succeeds for the model that is served, since programs pull a model before they use it. Nothing is downloaded."""
        async with admitted_request(state, request, OllamaPullRequest, one=True) as (body, _, _caller):
            state.check_model(body.name)
            response = json_response({"status": "success"})
            if body.stream is not False:
                response.headers["content-type"] = "application/x-ndjson"
            return response
