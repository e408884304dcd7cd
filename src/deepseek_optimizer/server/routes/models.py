"""/v1/models: describes the model that is served."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any

from fastapi import FastAPI, Path, Response

from ...engine.request import SamplingParams
from ..chat.replies import json_response
from ..openapi import errors
from ..protocol.models import ModelCard, ModelList
from ..state import ServerState

_SHOWN = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty")


def card(state: ServerState) -> dict[str, Any]:
    """Describes the model in /v1/models."""
    defaults = replace(SamplingParams(), **{name: value for name, value in state.settings.sampling.items() if name in _SHOWN})
    sampling = {**{name: getattr(defaults, name) for name in _SHOWN}, "max_tokens": state.max_answer_tokens}
    return {"id": state.model_name, "object": "model", "created": state.created, "owned_by": "deepseek-optimizer",
            "max_model_len": state.engine.context, "max_file_bytes": state.settings.max_file_bytes,
            "max_body_bytes": state.bodies.max_bytes,
            "max_pictures": 0 if state.pictures is None else state.settings.max_pictures,
            "default_sampling": sampling, "root": state.model_name, "parent": None}  # fmt: skip


def adapter_cards(state: ServerState) -> list[dict[str, Any]]:
    """Describes the model's adapters."""
    base = {**card(state), "parent": state.model_name}
    return [
        {**base, "id": adapter.name, "created": adapter.created, "root": str(adapter.path)} for adapter in state.engine.adapters
    ]


def add(app: FastAPI, state: ServerState) -> None:
    @app.get("/v1/models", response_model=ModelList, responses=errors(401, 403), tags=["models"])
    async def models() -> Response:
        """Lists the models that a request's `model` may name."""
        return json_response({"object": "list", "data": [card(state), *adapter_cards(state)]})

    @app.get("/v1/models/{model:path}", response_model=ModelCard, responses=errors(401, 403, 404), tags=["models"])
    async def model(model: Annotated[str, Path()]) -> Response:
        """Describes one model. Its name may contain slashes."""
        state.check_model(model)
        return json_response(next((other for other in adapter_cards(state) if other["id"] == model), card(state)))
