"""What went wrong, in the shape that OpenAI's clients expect: {"error": {"message", "type", "param", "code"}}.

No message holds a path, an address or a traceback: those go to the log.
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
    DocumentError,
    EngineBusyError,
    EngineDeadError,
    MissingPackageError,
    RequestError,
    WorkerLostError,
    excerpt,
)

logger = logging.getLogger("deepseek_optimizer.server")
_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """An answer that is an error.

    Args:
        status: of HTTP.
        message: for the client: what is wrong, and what to do.
        param: the field of the request that is at fault.
        code: a word that programs can look for.
        headers: beside the usual.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        self.status, self.message, self.param, self.code = status, message, param and excerpt(param), code
        self.headers = dict(headers or {})
        super().__init__(message)

    def body(self) -> dict[str, Any]:
        kind = _TYPES.get(self.status) or ("server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> Response:
        return Response(orjson.dumps(self.body()), self.status, self.headers, "application/json")


def busy(message: str, seconds: float = 1.0) -> ApiError:
    """503: not now."""
    return ApiError(503, message, code="unavailable", headers={"Retry-After": str(max(1, math.ceil(seconds)))})


def late() -> ApiError:
    """504: the deadline has passed. Clients that retry by themselves are told not to: it would take as long again."""
    return ApiError(
        504, "the answer was not done in the time that a request has", code="timeout", headers={"x-should-retry": "false"}
    )


def problem(error: BaseException) -> ApiError | None:
    """What a client is told of an error; None: it is none that a client can cause, so 500."""
    if isinstance(error, ApiError):
        return error
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
            503, "a process of the server was ended, or got no time, while it worked for this request; send it again",
            code="worker_lost", headers={"Retry-After": "1"},
        )  # fmt: skip
    if isinstance(error, HTTPException):
        names = {404: "there is nothing at this address", 405: "this address does not know this method"}
        return ApiError(error.status_code, names.get(error.status_code, str(error.detail)), headers=error.headers)
    return None


def _dead(cause: BaseException | None) -> ApiError:
    message, code = "the engine has stopped", "engine_dead"
    if isinstance(cause, CheckpointChangedError):
        name = os.path.basename(cause.file or "") or "a file of it"
        message = f"the model cannot be used any more: {name} {cause.what}; restore the file and restart the server"
        code = "model_file_changed"
    return ApiError(503, message, code=code, headers={"Retry-After": "30"})


INTERNAL = ApiError(500, "an error of the server; its log says more", code="internal_error")
