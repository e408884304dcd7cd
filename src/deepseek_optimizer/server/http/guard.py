"""What holds for every request: the Host, the key, headers that each answer carries, errors in one shape."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable
from typing import Any

from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..settings import ServerSettings
from .caller import client_of
from .hosts import HostCheck
from .metrics import HttpMetrics
from .problems import INTERNAL, ApiError, problem

logger = logging.getLogger("deepseek_optimizer.server")

_SECURITY = [
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
]
_METHODS = frozenset({"GET", "POST", "HEAD", "OPTIONS", "PUT", "DELETE", "PATCH", "TRACE", "CONNECT"})


class HostGuard:
    """Refuses what was sent to another name, before CORS or anything else answers."""

    def __init__(self, app: ASGIApp, settings: ServerSettings) -> None:
        self._app = app
        self._hosts = HostCheck(settings.host, settings.allow_hosts)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            hosts = Headers(scope=scope).getlist("host")
            if not self._hosts.accepts(hosts[0] if len(hosts) == 1 else None):
                refusal = ApiError(403, "this server is not known by that Host; --allow-host NAME makes it so", code="host")
                return await refusal.response()(scope, receive, send)
        await self._app(scope, receive, send)


class Guard:
    """Asks for the key, turns every error into an answer, and has HEAD answered as GET, whose body uvicorn leaves out.

    The key's hash is left in the scope's state as `salt`, what tells clients apart as `client` (see `caller`), and the time of
    arrival as `arrived`, of `time.monotonic`.

    Args:
        open_paths: that anyone may ask for.
    """

    def __init__(self, app: ASGIApp, settings: ServerSettings, metrics: HttpMetrics, open_paths: Iterable[str]) -> None:
        self._app, self._settings, self._metrics = app, settings, metrics
        self._open = frozenset(open_paths)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        arrived, asked = time.monotonic(), scope["method"]
        if asked == "HEAD":
            scope = {**scope, "method": "GET"}
        status = 0

        async def send_with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message = {**message, "headers": [*message.get("headers", ()), *_SECURITY]}
            await send(message)

        try:
            salt = self._salt(scope)
            scope.setdefault("state", {}).update(salt=salt, client=client_of(salt, scope.get("client")), arrived=arrived)
            await self._app(scope, receive, send_with_headers)
        except ClientDisconnect:
            status = status or 499  # nginx's number: nobody is there to read an answer
        except Exception as error:
            found = problem(error)
            if found is None:
                logger.exception("error in %s %s", asked, _handler(scope))
            if not status:
                await (found or INTERNAL).response()(scope, receive, send_with_headers)
            else:
                raise  # in the middle of an answer: uvicorn closes the connection, so that it can't pass for a whole one
        finally:
            status = status or 499  # a client that left before its answer began
            method = asked if asked in _METHODS else "other"
            self._metrics.record(_handler(scope), method, status, time.monotonic() - arrived)
            if self._settings.access_log:
                logger.info("%s %s %d %.3f s", method, _handler(scope), status, time.monotonic() - arrived)

    def _salt(self, scope: Scope) -> str:
        keys = self._settings.keys
        given = [value for name, value in scope["headers"] if name == b"authorization"]
        salt = keys.salt(given[0] if len(given) == 1 else None)
        if salt is not None:
            return salt
        if scope["path"] in self._open:
            return ""
        message = "the API key is wrong" if given else "this server asks for an API key: send Authorization: Bearer KEY"
        raise ApiError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})


def _handler(scope: dict[str, Any] | Scope) -> str:
    """The route's pattern, which FastAPI leaves in the scope; "other" where none matched."""
    return getattr(scope.get("route"), "path", None) or "other"
