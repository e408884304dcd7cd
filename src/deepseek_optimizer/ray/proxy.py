"""What runs in Ray's HTTP proxies: routing keys for the router, and a second attempt for requests whose replica died.

Ray's router sees the headers of a request but not its body, so a middleware of the proxy reads the body and adds the keys of
its prompt. Ray calls `middlewares` in each proxy if RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH names it.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import re
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from .prefix_keys import prefix_keys
from .routing_header import Routing, session_of, write

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

CALLBACK = "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"  # the environment variable that Ray reads in the proxy's process
IMPORT_PATH = f"{__name__}.middlewares"
REPLICA_HEADER = b"x-replica-id"  # of every response that a replica gave
_ATTEMPTS = 3
# Bodies that are larger, of another type or slower, or more at a time, are passed on in pieces, without keys and without a
# second attempt. The replicas have limits of their own. Form is what curl sends unless told otherwise.
_MAX_BODY, _MAX_HELD = 64 << 20, 256 << 20  # bytes of one, and of all that a proxy keeps
_READ_SECONDS = 10.0
_TYPES = (b"application/json", b"application/x-www-form-urlencoded")
# Files, batches and stored responses are at the replica that received them, so their clients stay there. Their paths may follow
# the prefix of an application.
_STATEFUL = re.compile(r"/v1/(files|batches|responses)(/|$)")
_REFERENCES = (b'"file_id"', b'"previous_response_id"', b'"input_file_id"')
_LOST = "the replica that was answering this request ended before its answer did; send the request again"
logger = logging.getLogger("deepseek_optimizer.ray")


def middlewares() -> list[Any]:
    """The middleware of a proxy, for Ray; none in a replica that HAProxy reaches without a proxy."""
    from ray import serve
    from ray.serve.exceptions import RayServeException
    from starlette.middleware import Middleware

    try:
        serve.get_replica_context()
        return []
    except RayServeException:  # not a replica
        pass
    return [Middleware(RoutedRequests, header=os.environ.get("RAY_SERVE_SESSION_ID_HEADER_KEY", "x-session-id"))]


class RoutedRequests:
    """ASGI middleware: adds the routing header to requests with a prompt, and repeats those whose replica ended before the
    first byte of its answer. Other requests, which may be those of other applications, are not repeated.

    If a replica ends later, a stream of events gets an event with an error, and any other answer stays incomplete, so
    that clients notice.

    Args:
        app: the proxy.
        header: name of the header with a session id. Clients may send it.
    """

    def __init__(self, app: Callable[[Any, Receive, Send], Awaitable[None]], header: str) -> None:
        self._app, self._header = app, header.encode("latin-1")
        self._held = 0

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        body = _Body(receive)
        kind = dict(scope["headers"]).get(b"content-type", b"").lower()
        try:
            if kind.startswith(_TYPES):
                await self._read(body)
            if not body.left:
                await self._answer(scope, body, receive, send)
        finally:
            self._held -= body.size

    async def _read(self, body: _Body) -> None:
        """Reads a body, unless it takes too much memory or time."""
        end = time.monotonic() + _READ_SECONDS
        while not body.complete and not body.left and body.size <= _MAX_BODY and self._held <= _MAX_HELD:
            before = body.size
            try:
                await asyncio.wait_for(body.read(), end - time.monotonic())
            except asyncio.TimeoutError:
                return
            finally:
                self._held += body.size - before

    async def _answer(self, scope: MutableMapping[str, Any], read: _Body, receive: Receive, send: Send) -> None:
        body = read.all() if read.complete else None
        keys = prefix_keys(body) if body else []
        routed = self._routed(scope, keys, body)
        for attempt in range(1, _ATTEMPTS + 1):
            answer, request = _Answer(send), _Request(read.messages, receive)
            await self._app({**routed}, request, answer)  # a copy: Ray adds the application's prefix to its root path
            if answer.complete or request.left or not keys:
                return
            if answer.started or attempt == _ATTEMPTS:
                await answer.end()
                return
            logger.warning("a replica ended before its answer; attempt %d of %d", attempt + 1, _ATTEMPTS)

    def _routed(self, scope: MutableMapping[str, Any], keys: list[str], body: bytes | None) -> MutableMapping[str, Any]:
        """The scope with the keys beside the session in its header."""
        headers = scope["headers"]
        named = dict(reversed(headers))  # the first one of each name
        given = next((value for name, value in headers if self._is_session(name) and value), None)
        session = None if given is None else b"session " + given
        stays = bool(_STATEFUL.search(scope["path"]) or (body and any(word in body for word in _REFERENCES)))
        if stays and session is None:
            key = named.get(b"authorization") or named.get(b"x-api-key")
            session = b"key " + key if key else b"peer " + str((scope.get("client") or ("",))[0]).encode()
        if session is None and not keys:
            return scope
        routing = Routing(None if session is None else session_of(session.decode("latin-1")), keys, stays)
        others = [(name, value) for name, value in headers if not self._is_session(name)]
        return {**scope, "headers": [*others, (self._header.lower(), write(routing).encode())]}

    def _is_session(self, name: bytes) -> bool:
        """Whether a header has the session id for Ray, which takes - and _ for the same."""
        return name.lower().replace(b"_", b"-") == self._header.lower().replace(b"_", b"-")


class _Body:
    """The body of a request, as far as it was read.

    Attributes:
        messages: that were read.
        size: bytes that were read.
        complete: whether that is all.
        left: whether the client is gone.
    """

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self.messages: list[Message] = []
        self.size, self.complete, self.left = 0, False, False

    async def read(self) -> None:
        """Reads one message."""
        message = await self._receive()
        self.messages.append(message)
        self.left = message["type"] != "http.request"
        self.size += len(message.get("body", b""))
        self.complete = not self.left and not message.get("more_body", False)

    def all(self) -> bytes:
        return b"".join(message.get("body", b"") for message in self.messages)


class _Request:
    """A `receive` that returns messages that were read before, then those that follow.

    Attributes:
        left: whether the client is gone, so that no further attempt has a reader.
    """

    def __init__(self, messages: list[Message], receive: Receive) -> None:
        self._messages, self._receive = iter(messages), receive
        self.left = False

    async def __call__(self) -> Message:
        message = next(self._messages, None)
        if message is None:
            message = await self._receive()
        self.left |= message["type"] == "http.disconnect"
        return message


class _Answer:
    """Sends an answer on, and knows how far it is.

    Attributes:
        started: whether its headers were sent.
        complete: whether all of it was sent.
    """

    def __init__(self, send: Send) -> None:
        self._send = send
        self.started = self.complete = False
        self._events = False

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.started = True
            self._events = dict(message.get("headers", ())).get(b"content-type", b"").startswith(b"text/event-stream")
        elif message["type"] == "http.response.body" and not message.get("more_body", False):
            self.complete = True
        await self._send(message)

    async def end(self) -> None:
        """Tells the client that no more follows."""
        error = json.dumps(
            {"type": "error", "error": {"message": _LOST, "type": "server_error", "code": "replica_lost"}}
        ).encode()
        if not self.started:
            headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(error)), (b"retry-after", b"1")]
            await self._send({"type": "http.response.start", "status": 503, "headers": headers})
            await self._send({"type": "http.response.body", "body": error})
        elif self._events:
            await self._send({"type": "http.response.body", "body": b"event: error\ndata: " + error + b"\n\n"})


def note_replica(app: Any, replica: str) -> Any:
    """An application whose responses name the replica that gave them, and leave the id of the request to Ray, which adds it."""

    async def named(scope: Any, receive: Receive, send: Send) -> None:
        async def send_named(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = [header for header in message.get("headers", ()) if header[0].lower() != b"x-request-id"]
                message = {**message, "headers": [*headers, (REPLICA_HEADER, replica.encode())]}
            await send(message)

        await app(scope, receive, send_named if scope["type"] == "http" else send)

    return named
