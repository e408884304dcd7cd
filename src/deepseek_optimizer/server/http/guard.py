"""Middleware for every request: checks of Host and API key, security headers, and errors in one format."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable
from typing import Any

from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..settings import ServerSettings
from . import request_id
from .caller import FOR_OWNER, client_of
from .error_formats import error_response
from .hosts import HostCheck
from .ignored_fields import HEADER, IgnoredFieldLog
from .metrics import HttpMetrics
from .paths import path_of
from .problems import INTERNAL, ApiError, problem

logger = logging.getLogger("deepseek_optimizer.server")

_SECURITY = [
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
]
_METHODS = frozenset({"GET", "POST", "HEAD", "OPTIONS", "PUT", "DELETE", "PATCH", "TRACE", "CONNECT"})


class HostGuard:
    """Refuses requests with an unexpected Host header, before CORS or anything else responds."""

    def __init__(self, app: ASGIApp, settings: ServerSettings) -> None:
        self._app = app
        self._hosts = HostCheck(settings.host, settings.allow_hosts)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            hosts = Headers(scope=scope).getlist("host")
            if not self._hosts.accepts(hosts[0] if len(hosts) == 1 else None):
                refusal = ApiError(403, "this Host header is not accepted; --allow-host NAME allows it", code="host")
                return await refusal.response()(scope, receive, send)
        await self._app(scope, receive, send)


class Guard:
    """Checks the API key, converts exceptions to error responses, and answers HEAD like GET; uvicorn omits the body.

    It sets, in the scope's state, `salt` (a hash of the key), `client` (see `caller`), `arrived` (time of `time.monotonic`) and
    `ignored_fields`, a list to which routes add the names of ignored fields of the request; and the request's id for the log
    and the response.

    Args:
        open_paths: paths that need no key.
    """

    def __init__(self, app: ASGIApp, settings: ServerSettings, metrics: HttpMetrics, open_paths: Iterable[str]) -> None:
        self._app, self._settings, self._metrics = app, settings, metrics
        self._open = frozenset(open_paths)
        self._ignored = IgnoredFieldLog()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        arrived, requested = time.monotonic(), scope["method"]
        id = request_id.request_id(scope)
        request_id.current.set(id)
        own = [*_SECURITY, (request_id.HEADER, id.encode())]
        if requested == "HEAD":
            scope = {**scope, "method": "GET"}
        status = 0

        async def send_with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = [*message.get("headers", ()), *own]
                if scope["state"]["ignored_fields"]:
                    headers.append((HEADER.lower().encode(), self._ignored.report(scope["state"]["ignored_fields"]).encode()))
                message = {**message, "headers": headers}
            await send(message)

        try:
            scope.setdefault("state", {})["ignored_fields"] = []
            salt = self._salt(scope)
            client = f"batch {salt}" if FOR_OWNER in scope else client_of(salt, scope.get("client"))
            scope["state"].update(salt=salt, client=client, arrived=arrived)
            await self._app(scope, receive, send_with_headers)
        except ClientDisconnect:
            status = status or 499  # nginx's status for a client that has disconnected
        except Exception as error:
            api_error = problem(error)
            if api_error is None:
                logger.exception("error in %s %s", requested, _handler(scope))
            if not status:
                response = error_response(api_error or INTERNAL, path_of(scope))
                await response(scope, receive, send_with_headers)
            else:
                raise  # the response has begun: uvicorn closes the connection, so that it does not look complete
        finally:
            status = status or 499  # the client disconnected before the response began
            method = requested if requested in _METHODS else "other"
            self._metrics.record(_handler(scope), method, status, time.monotonic() - arrived)
            if self._settings.access_log:
                route, seconds = _handler(scope), time.monotonic() - arrived
                line = {"method": method, "route": route, "status": status, "seconds": round(seconds, 6)}
                logger.info("%s %s %d %.3f s", method, route, status, seconds, extra=line)

    def _salt(self, scope: Scope) -> str:
        internal: str | None = scope.get(FOR_OWNER)
        if internal is not None:
            return internal
        keys = self._settings.keys
        given = [value for name, value in scope["headers"] if name == b"authorization"]
        own = [value for name, value in scope["headers"] if name == b"x-api-key"]  # of Anthropic's clients
        for header in (given[0] if len(given) == 1 else None, b"Bearer " + own[0] if len(own) == 1 else None):
            salt = keys.salt(header)
            if salt is not None:
                return salt
        if path_of(scope) in self._open and scope["method"] == "GET":
            return ""
        message = "the API key is wrong" if given or own else "this server requires an API key: send Authorization: Bearer KEY"
        raise ApiError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})


def _handler(scope: dict[str, Any] | Scope) -> str:
    """The pattern of the matching route, which FastAPI stores in the scope; "other" if there is none."""
    return getattr(scope.get("route"), "path", None) or "other"
