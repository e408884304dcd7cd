"""/api/tags, /api/ps, /api/show and /api/version: describe the model that is served, in Ollama's format."""

from __future__ import annotations

import hashlib
from typing import Any

from fastapi import FastAPI, Request, Response

from ....errors import RequestError
from ...chat.intake import admitted_request
from ...chat.ollama_answers import timestamp
from ...chat.replies import json_response
from ...openapi import body_errors, errors, reads
from ...protocol.ollama.requests import EXAMPLE_SHOW, OllamaShowRequest
from ...protocol.ollama.responses import OllamaError, OllamaModels, OllamaProcesses, OllamaShow, OllamaVersion
from ...state import ServerState

_VERSION = "0.12.0"  # of Ollama, whose API this is; clients check it
_FOREVER = 4_102_444_800  # January 1, 2100: the model stays loaded


def add(app: FastAPI, state: ServerState) -> None:
    def details() -> dict[str, Any]:
        return {"parent_model": "", "format": "safetensors", "family": "", "families": [], "parameter_size": "",
                "quantization_level": ""}  # fmt: skip

    def card() -> dict[str, Any]:
        name = state.model_name if ":" in state.model_name else f"{state.model_name}:latest"
        digest = hashlib.sha256(name.encode()).hexdigest()
        return {"name": name, "model": name, "modified_at": timestamp(state.created), "size": 0, "digest": digest,
                "details": details()}  # fmt: skip

    @app.get("/api/tags", response_model=OllamaModels, responses=errors(401, 403, model=OllamaError), tags=["ollama"])
    async def tags() -> Response:
        """Lists the models that a request may name."""
        return json_response({"models": [card()]})

    @app.get("/api/ps", response_model=OllamaProcesses, responses=errors(401, 403, model=OllamaError), tags=["ollama"])
    async def running() -> Response:
        """Lists the loaded models."""
        more = {"expires_at": timestamp(_FOREVER), "size_vram": 0, "context_length": state.engine.context}
        return json_response({"models": [{**card(), **more}]})

    @app.get("/api/version", response_model=OllamaVersion, responses=errors(401, 403, model=OllamaError), tags=["ollama"])
    async def version() -> Response:
        """The version of Ollama's API that this server follows."""
        return json_response({"version": _VERSION})

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
            try:
                template = state.template.source()
                capabilities += ["tools"]  # with any chat template
                capabilities += ["thinking"] if state.thinks(False) else []
            except RequestError:  # the model has no chat template
                pass
            capabilities += ["insert"] if state.fill_in is not None else []
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
