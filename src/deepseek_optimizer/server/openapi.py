"""The OpenAPI schema. Routes read their bodies themselves, after admission, so the schema learns of their models here."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from .protocol.base import ErrorBody

_WHY = {
    400: "The request is wrong; the error names the field.",
    401: "The API key is missing or wrong.",
    403: "The Host header names another server, or a page of another origin sends a file.",
    404: "There is no such model, file or address.",
    405: "The address does not know this method.",
    408: "The request came too slowly.",
    413: "The body or a file is too large.",
    415: "The body is not JSON, or no form where one is asked for, by its headers.",
    429: "The queue is full; Retry-After says when to try again.",
    500: "An error of the server.",
    501: "A library that reads this is not installed; the error names the extra that brings it.",
    503: "The server can't answer now.",
    504: "The answer was not done in the time that a request has.",
}
_OF_BODIES = (400, 401, 403, 404, 408, 413, 415, 429, 500, 501, 503, 504)


def errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """For a route's `responses`."""
    return {status: {"model": ErrorBody, "description": _WHY[status]} for status in statuses}


def body_errors() -> dict[int | str, dict[str, Any]]:
    """Of routes that read a body."""
    return errors(*_OF_BODIES)


def reads(model: type[BaseModel], example: dict[str, Any]) -> dict[str, Any]:
    """For a route's `openapi_extra`: that its body is this."""
    schema = {"$ref": f"#/components/schemas/{model.__name__}"}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema, "example": example}}}}


def events() -> dict[str, Any]:
    """Of a 200 that may be a stream."""
    text = "With `stream`: server-sent events."
    return {"description": text, "content": {"text/event-stream": {}}}


def install(app: FastAPI, bodies: list[type[BaseModel]], keys: bool) -> None:
    """Makes the app's schema once, with the models of bodies among its components."""

    def schema() -> dict[str, Any]:
        if app.openapi_schema is None:
            found = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
            _, definitions = models_json_schema(
                [(model, "validation") for model in bodies], ref_template="#/components/schemas/{model}"
            )
            components = found.setdefault("components", {})
            components.setdefault("schemas", {}).update(definitions["$defs"])
            for name in ("HTTPValidationError", "ValidationError"):
                components["schemas"].pop(name, None)
            for operations in found["paths"].values():
                for operation in operations.values():
                    operation["responses"].pop("422", None)  # FastAPI's own; ours is 400
            if keys:
                components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
                found["security"] = [{"key": []}]
            app.openapi_schema = found
        return app.openapi_schema

    app.openapi = schema  # type: ignore[method-assign]
