"""Error responses in the format of the protocol that a path belongs to; OpenAI's is in `problems`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import orjson
from starlette.responses import Response

from .problems import ApiError

_ANTHROPIC_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    500: "api_error",
    501: "api_error",
    503: "overloaded_error",
    504: "timeout_error",
}


def anthropic_error(error: ApiError) -> dict[str, Any]:
    """The body of an error of Anthropic's API."""
    kind = _ANTHROPIC_TYPES.get(error.status, "invalid_request_error")
    return {"type": "error", "error": {"type": kind, "message": error.message}}


def ollama_error(error: ApiError) -> dict[str, Any]:
    """The body of an error of Ollama's API."""
    return {"error": error.message}


def tgi_error(error: ApiError) -> dict[str, Any]:
    """The body of an error of TGI's API."""
    kind = "validation" if error.status < 500 and error.status != 429 else "overloaded" if error.status != 500 else "generation"
    return {"error": error.message, "error_type": kind}


_FORMATS: dict[str, Callable[[ApiError], dict[str, Any]]] = {
    "/v1/messages": anthropic_error,
    "/api/": ollama_error,
    "/generate": tgi_error,
}


def error_response(error: ApiError, path: str) -> Response:
    """An error as the response to a request.

    Args:
        error: the error.
        path: of the request, without the root path.
    """
    for prefix, body in _FORMATS.items():
        if path.startswith(prefix):
            return Response(orjson.dumps(body(error)), error.status, error.headers, "application/json")
    return error.response()
