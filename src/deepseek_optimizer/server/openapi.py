"""The OpenAPI schema. Routes read their bodies themselves, after admission, so their models are added to the schema here."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from .protocol.base import ErrorBody

_WHY = {
    400: "The request is invalid; the error names the field.",
    401: "The API key is missing or wrong.",
    403: "The Host header names another server, or a page of another origin sends a file.",
    404: "There is no such model, file or path.",
    405: "The path does not support this method.",
    408: "The request was received too slowly.",
    409: "The batch has ended.",
    413: "The body or a file is too large.",
    415: "The Content-Type is not JSON, or not a multipart form where one is required.",
    429: "The queue is full; Retry-After says when to try again.",
    500: "Internal server error.",
    501: "A required library is not installed; the error names the extra to install.",
    503: "The server cannot answer now.",
    504: "The request timed out.",
    507: "The disk cannot be written.",
}
_OF_BODIES = (400, 401, 403, 404, 408, 413, 415, 429, 500, 501, 503, 504)


def errors(*statuses: int, model: type[BaseModel] = ErrorBody) -> dict[int | str, dict[str, Any]]:
    """The `responses` of a route that can return these error statuses; `model`: of the error's body."""
    return {status: {"model": model, "description": _WHY[status]} for status in statuses}


def body_errors(model: type[BaseModel] = ErrorBody) -> dict[int | str, dict[str, Any]]:
    """The `responses` of a route that reads a JSON body; `model`: of the error's body."""
    return errors(*_OF_BODIES, model=model)


def reads(model: type[BaseModel], example: dict[str, Any]) -> dict[str, Any]:
    """The `openapi_extra` of a route whose body has this model."""
    schema = {"$ref": f"#/components/schemas/{model.__name__}"}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema, "example": example}}}}


def events() -> dict[str, Any]:
    """The description of a 200 response that may be a stream."""
    text = "With `stream`: server-sent events."
    return {"description": text, "content": {"text/event-stream": {}}}


def lines() -> dict[str, Any]:
    """The description of a 200 response that may be a stream of lines."""
    text = "With `stream`: a JSON object per line."
    return {"description": text, "content": {"application/x-ndjson": {}}}


def install(app: FastAPI, bodies: list[type[BaseModel]], keys: bool, strict: bool) -> None:
    """Makes the app create its schema on first use, with the models of bodies among the components.

    Args:
        app: changed in place.
        bodies: models of JSON bodies.
        keys: whether requests need an API key.
        strict: whether unknown fields of bodies are errors.
    """

    def schema() -> dict[str, Any]:
        if app.openapi_schema is None:
            document = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
            _, definitions = models_json_schema(
                [(model, "validation") for model in bodies], ref_template="#/components/schemas/{model}"
            )
            if not strict:
                for definition in definitions["$defs"].values():
                    definition.pop("additionalProperties", None)
            components = document.setdefault("components", {})
            components.setdefault("schemas", {}).update(definitions["$defs"])
            for name in ("HTTPValidationError", "ValidationError"):
                components["schemas"].pop(name, None)
            for operations in document["paths"].values():
                for operation in operations.values():
                    operation["responses"].pop("422", None)  # FastAPI's status of an invalid request; this server returns 400
            if keys:
                components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
                document["security"] = [{"key": []}]
            app.openapi_schema = document
        return app.openapi_schema

    app.openapi = schema  # type: ignore[method-assign]
