"""uvicorn's HTTP protocol with limits on headers and on clients that do not read, and error responses to malformed requests.

Headers that are too large are answered with 431, headers that do not arrive in time with 408, too many connections with 503,
malformed HTTP with 400, an unsupported Transfer-Encoding with 501; then the connection is closed. A client that leaves a full
buffer unread is disconnected. Requests before a malformed one in the same connection are answered first.

This uses private parts of uvicorn (`cycle`, `pipeline`, the parser's callbacks), so pyproject.toml limits its version.
"""

from __future__ import annotations

import asyncio
from http import HTTPStatus
from typing import Any

import orjson
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from ..settings import ServerSettings
from .lingering import LingeringTransport
from .problems import ApiError


class _Refused(Exception):
    """Raised in a callback to stop the parser."""


class BoundedProtocol(HttpToolsProtocol):
    """One connection. `protocol_for` creates the class with its `limits`."""

    limits: ServerSettings
    transport: LingeringTransport  # type: ignore[assignment]

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.transport = LingeringTransport(transport, self.limits.body_seconds, self.limits.max_body_bytes_total)
        self._in_head = False
        self._head_bytes = 0
        self._refusal: ApiError | None = None  # why the parser was stopped
        self._due: ApiError | None = None  # the response after those to earlier requests; nothing more is parsed
        self._head_timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None
        if len(self.connections) > self.limits.max_connections:
            self._refuse(ApiError(503, "too many connections", code="unavailable", headers={"Retry-After": "1"}))
            if len(self.connections) > 2 * self.limits.max_connections:
                self.transport.close_now()
        else:
            self._arm_head_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        self.transport.forget()
        self._stop_head_timer()
        self._stop_write_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self.transport.lingering:
            return self.transport.discard(len(data))
        if self.transport.is_closing() or self._due is not None:
            return
        begun = self._in_head
        super().data_received(data)
        if self.transport.is_closing() or self._due is not None:
            return
        if self._in_head:
            self._head_bytes += len(data) if begun else 0  # the first chunk, at most one read, is not counted
            if self._head_bytes > self.limits.max_header_bytes:
                return self._refuse(self._too_large())
        if self._in_head or self.cycle is None or self.cycle.response_complete:
            self._arm_head_timer()

    # Callbacks of the parser.

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._in_head, self._head_bytes, self._parsed_bytes = True, 0, 0

    def on_url(self, url: bytes) -> None:
        super().on_url(url)
        self._count(len(url))

    def on_header(self, name: bytes, value: bytes) -> None:
        super().on_header(name, value)
        self._count(len(name) + len(value) + 4)
        if len(self.headers) > self.limits.max_headers:
            self._stop_parser(self._too_large())

    def on_headers_complete(self) -> None:
        wrong = _wrong_coding(self.headers, self.parser.get_http_version())
        if wrong is not None:
            self._stop_parser(wrong)
        self._in_head = False
        self._stop_head_timer()
        super().on_headers_complete()

    def _count(self, size: int) -> None:
        self._parsed_bytes += size
        if self._parsed_bytes > self.limits.max_header_bytes:
            self._stop_parser(self._too_large())

    def _stop_parser(self, error: ApiError) -> None:
        self._refusal = error
        raise _Refused

    def _too_large(self) -> ApiError:
        limits = self.limits
        return ApiError(431, f"the request's headers exceed {limits.max_header_bytes} bytes or {limits.max_headers} fields")

    def _unsupported_upgrade_warning(self) -> None:
        """Answers a request for another protocol in HTTP and closes the connection: the parser drops what follows it."""
        self.cycle.keep_alive = False
        if self.cycle.response_complete:
            self._close()

    # Responses of the connection itself.

    def send_400_response(self, msg: str) -> None:
        self._refuse(self._refusal or ApiError(400, "the request is not valid HTTP"))

    def _refuse(self, error: ApiError) -> None:
        """Responds with an error to the data being received, after the responses to earlier requests, and closes."""
        self._due = error
        self._stop_head_timer()
        cycle = self.cycle
        if cycle is not None and cycle.more_body:  # the data is that request's body
            if self.pipeline:
                self.pipeline.popleft()  # the newest; earlier requests are answered first
                return
            if cycle.response_started:  # an incomplete response can only be ended by closing
                return self._close()
            cycle.disconnected = True  # its handler learns that the client is gone
            cycle.message_event.set()
            self._answer_due()
        elif cycle is None or (cycle.response_complete and not self.pipeline):
            self._answer_due()

    def on_response_complete(self) -> None:
        last = not self.pipeline
        super().on_response_complete()
        if last and self._due is not None and not self.transport.is_closing():
            self._answer_due()

    def _answer_due(self) -> None:
        error = self._due
        assert error is not None
        body = orjson.dumps(error.body())
        lines = [f"HTTP/1.1 {error.status} {HTTPStatus(error.status).phrase}", "content-type: application/json",
                 "connection: close", f"content-length: {len(body)}"]  # fmt: skip
        lines += [f"{name}: {value}" for name, value in error.headers.items()]
        self.transport.write("\r\n".join((*lines, "", "")).encode("latin-1") + body)
        self._close()

    def _close(self) -> None:
        self._stop_head_timer()
        self.transport.close()  # sends the remaining data first, to a client that may not read
        self._arm_write_timer()

    def shutdown(self) -> None:
        """Called when the server stops: closes the connection if it is idle."""
        if self.cycle is None or self.cycle.response_complete:
            self._close_idle()
        else:
            super().shutdown()

    def _close_idle(self) -> None:
        self._stop_head_timer()
        if not self.transport.lingering:
            self.transport.close_now()

    # Timers.

    def _arm_head_timer(self) -> None:
        if self._head_timer is None:
            self._head_timer = self.loop.call_later(self.limits.header_seconds, self._head_too_slow)

    def _stop_head_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _head_too_slow(self) -> None:
        self._head_timer = None
        if self._in_head or self.cycle is None:
            self._refuse(ApiError(408, "the request's headers were received too slowly", code="timeout"))
        elif self.cycle.more_body:  # of a request that was answered before its body arrived
            self._close()
        else:  # between requests
            self._close_idle()

    def timeout_keep_alive_handler(self) -> None:
        self._close_idle()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._arm_write_timer()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._stop_write_timer()

    def _arm_write_timer(self) -> None:
        if self._write_timer is None:
            self._write_timer = self.loop.call_later(self.limits.write_seconds, self.transport.abort)

    def _stop_write_timer(self) -> None:
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None


def _wrong_coding(headers: list[tuple[bytes, bytes]], version: str) -> ApiError | None:
    """The error in a request's Transfer-Encoding, of which only `chunked` is supported; None if there is none. A body with an
    ambiguous end could smuggle in another request, so nothing is guessed."""
    fields = [value for name, value in headers if name == b"transfer-encoding"]
    if not fields:
        return None
    codings = [coding.strip(b" \t").lower() for coding in b",".join(fields).split(b",")]
    if version == "1.0" or codings[-1] != b"chunked" or codings.count(b"chunked") > 1:
        return ApiError(400, "the request's Transfer-Encoding must be chunked")
    if len(codings) > 1:
        return ApiError(501, "no Transfer-Encoding other than chunked is supported; send the body without it")
    return None


def protocol_for(settings: ServerSettings) -> type[Any]:
    """The protocol class for uvicorn's `http=`, with these limits."""
    return type("Connection", (BoundedProtocol,), {"limits": settings})
