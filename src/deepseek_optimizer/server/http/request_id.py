"""The id of a request: the client's `X-Request-Id` if it is short and plain, otherwise a new one. It is returned in the
response, and part of each line of the log that the request causes."""

from __future__ import annotations

import re
import uuid
from contextvars import ContextVar

from starlette.types import Scope

HEADER = b"x-request-id"
_VALID = re.compile(rb"[A-Za-z0-9._:/+=@-]{1,128}")  # of a header; anything else could confuse what reads the logs
current: ContextVar[str | None] = ContextVar("request_id", default=None)


def request_id(scope: Scope) -> str:
    """The id of a request.

    Args:
        scope: of the ASGI request.
    """
    given = [value for name, value in scope["headers"] if name == HEADER]
    if len(given) == 1 and _VALID.fullmatch(given[0]):
        return str(given[0].decode("ascii"))
    return uuid.uuid4().hex
