"""/health, /ready and /metrics."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI, Response
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from ..openapi import errors
from ..protocol.models import Status
from ..state import ServerState


def add(app: FastAPI, state: ServerState) -> None:
    down: dict[int | str, dict[str, Any]] = {503: {"model": Status, "description": "The server is not available."}}

    text: dict[int | str, dict[str, Any]] = {200: {"description": "Prometheus' text format.", "content": {"text/plain": {}}}}

    @app.get("/health", response_model=Status, responses=errors(403) | down, tags=["status"])
    async def health() -> Response:
        """Whether the server can answer: 503 after the engine has stopped."""
        alive = state.engine.alive
        return JSONResponse({"status": "ok" if alive else "dead"}, 200 if alive else 503)

    @app.get("/ready", response_model=Status, responses=errors(403) | down, tags=["status"])
    async def ready() -> Response:
        """Whether the server accepts requests: 503 also while it is shutting down or sleeps."""
        status = "draining" if state.draining else "sleeping" if state.sleeping else "ok" if state.engine.alive else "dead"
        return JSONResponse({"status": status}, 200 if status == "ok" else 503)

    @app.get(
        "/metrics",
        response_class=Response,
        responses=errors(401, 403) | text,
        tags=["status"],
    )
    async def metrics() -> Response:
        """Prometheus metrics, with vLLM's names for the same quantities."""
        return Response(generate_latest(state.engine.registry), headers={"Content-Type": CONTENT_TYPE_LATEST})
