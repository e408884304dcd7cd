"""/completions without /v1: llama-server's form if the request names no model; clients of OpenAI's API always name one."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.routing import APIRoute

from ...state import ServerState


def add(app: FastAPI, state: ServerState) -> None:
    """Adds the route. Those of both forms must exist already."""
    endpoints: dict[str, Any] = {route.path: route.endpoint for route in app.routes if isinstance(route, APIRoute)}
    native, openai = endpoints["/completion"], endpoints["/v1/completions"]

    @app.post("/completions", include_in_schema=False)
    async def completions(request: Request) -> Response:
        """As /v1/completions if the request has a `model`, otherwise as /completion."""
        state.check_accepting()
        request.state.body = body, _ = await state.bodies.read(request)
        answer: Response = await (openai if body.get("model") else native)(request)
        return answer
