"""Error responses in OpenAI's format: {"error": {"message", "type", "param", "code"}}.

No message contains a path, an address or a traceback; those are logged.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Mapping
from typing import Any

import orjson
from starlette.exceptions import HTTPException
from starlette.responses import Response

from ...errors import (
    CheckpointChangedError,
    ContextLengthError,
    DocumentError,
    EngineBusyError,
    EngineDeadError,
    MissingPackageError,
    RankLostError,
    RequestError,
    WorkerLostError,
    excerpt,
)

logger = logging.getLogger("deepseek_optimizer.server")
_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """An error response.

    Args:
        status: HTTP status.
        message: for the user: what is wrong, and what to do.
        param: the field of the request that caused it.
        code: identifies the error for programs.
        headers: additional headers.
        kind: OpenAI's type of the error, or another server's; None: OpenAI's for the status.
        details: further fields of the error.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
        kind: str | None = None,
        details: Mapping[str, Any] | None = None,
    ) -> None:
        self.status, self.message, self.param, self.code = status, message, param and excerpt(param), code
        self.headers, self._kind, self._details = dict(headers or {}), kind, dict(details or {})
        super().__init__(message)

    def body(self) -> dict[str, Any]:
        kind = self._kind or _TYPES.get(self.status) or ("server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code, **self._details}}

    def response(self) -> Response:
        return Response(orjson.dumps(self.body()), self.status, self.headers, "application/json")


def busy(message: str, seconds: float = 1.0) -> ApiError:
    """503: the server cannot answer now; the client may retry after `seconds`."""
    return ApiError(503, message, code="unavailable", headers={"Retry-After": str(max(1, math.ceil(seconds)))})


def not_enabled(message: str) -> ApiError:
    """501: the server was started without what the request needs."""
    return ApiError(501, message, code="not_enabled")


def timed_out() -> ApiError:
    """504: the deadline has passed. A header tells clients not to retry automatically, which would take as long again."""
    return ApiError(504, "the request timed out", code="timeout", headers={"x-should-retry": "false"})


def problem(error: BaseException) -> ApiError | None:
    """The response for an exception; None if it is not one that a client can cause, which means 500."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, ContextLengthError):  # llama-server's type and fields, and OpenAI's code
        return ApiError(
            400, str(error), param=error.field, code="context_length_exceeded", kind="exceed_context_size_error",
            details={"n_prompt_tokens": error.tokens, "n_ctx": error.context},
        )  # fmt: skip
    if isinstance(error, RequestError):
        return ApiError(400, str(error), param=error.field)
    if isinstance(error, DocumentError):
        return ApiError(400, f"{excerpt(error.file)}: {error.message}", param="file", code="unreadable_file")
    if isinstance(error, MissingPackageError):
        return ApiError(501, str(error), code="missing_package")
    if isinstance(error, EngineBusyError):
        after = {"Retry-After": str(max(1, math.ceil(error.retry_after)))}
        return ApiError(429, str(error), code="queue_full", headers=after)
    if isinstance(error, EngineDeadError):
        return _dead(error.__cause__)
    if isinstance(error, WorkerLostError):
        logger.error("%s", error)
        return ApiError(
            503, "a worker process of the server was killed, or got no CPU time, while it handled this request; send it again",
            code="worker_lost", headers={"Retry-After": "1"},
        )  # fmt: skip
    if isinstance(error, HTTPException):
        texts = {404: "there is no such path", 405: "this path does not support this method"}
        return ApiError(error.status_code, texts.get(error.status_code, str(error.detail)), headers=error.headers)
    return None


def _dead(cause: BaseException | None) -> ApiError:
    message, code = "the engine has stopped", "engine_dead"
    if isinstance(cause, CheckpointChangedError):
        name = os.path.basename(cause.file or "") or "one of its files"
        message = f"the model can no longer be used: {name} {cause.what}; restore the file and restart the server"
        code = "model_file_changed"
    elif isinstance(cause, RankLostError):
        message, code = "a process that runs a part of the model has ended, and the server has to restart", "rank_lost"
    return ApiError(503, message, code=code, headers={"Retry-After": "30"})


INTERNAL = ApiError(500, "internal server error; see the server's log", code="internal_error")
