"""/health, /ready and /metrics."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI, Response
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from ..http.llama_metrics import LlamaMetrics
from ..http.problems import not_enabled
from ..openapi import errors
from ..protocol.models import Status
from ..settings import ServerSettings
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
        """Whether the server accepts requests: 503 also while it is shutting down or sleeps until /wake_up."""
        asleep = state.sleeping and not state.until_used
        status = "draining" if state.draining else "sleeping" if asleep else "ok" if state.engine.alive else "dead"
        return JSONResponse({"status": status}, 200 if status == "ok" else 503)

    llama = LlamaMetrics(state.engine)
    headers = {"Content-Type": CONTENT_TYPE_LATEST, "Process-Start-Time-Unix": str(state.created)}

    @app.get(
        "/metrics",
        response_class=Response,
        responses=errors(401, 403, 501) | text,
        tags=["status"],
    )
    async def metrics() -> Response:
        """Prometheus metrics, with vLLM's names for the same quantities, and llama-server's."""
        check_metrics(state.settings)
        return Response(generate_latest(state.engine.registry) + llama.text(), headers=headers)


def check_metrics(settings: ServerSettings) -> None:
    """Raises ApiError 501 if the server shows no metrics."""
    if not settings.metrics:
        raise not_enabled("metrics are not shown by this server, which was started with --no-metrics")
