"""uvicorn's HTTP protocol with what it lacks: bounds on heads and on clients that don't read, answers to what is malformed.

A head that is too large is answered with 431, one that does not come with 408, a connection too many with 503, what is not HTTP
with 400, a coding of the body that isn't known with 501, and then the connection is closed. A client that leaves a full buffer
unread is cut. Requests before a malformed one in the same connection are answered first.

It uses what is not public in uvicorn (`cycle`, `pipeline`, the parser's callbacks), so pyproject.toml bounds its version.
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
    """Stops the parser."""


class BoundedProtocol(HttpToolsProtocol):
    """One connection. Made by `protocol_for`, which gives it its limits."""

    limits: ServerSettings
    transport: LingeringTransport  # type: ignore[assignment]

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.transport = LingeringTransport(transport, self.limits.body_seconds, self.limits.max_body_bytes_total)
        self._in_head = False
        self._head_bytes = 0
        self._refusal: ApiError | None = None  # what the parser is stopped for
        self._due: ApiError | None = None  # what is answered once the requests before are; nothing more is parsed
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
            self._head_bytes += len(data) if begun else 0  # of a head's first piece, no more than a read's worth goes uncounted
            if self._head_bytes > self.limits.max_header_bytes:
                return self._refuse(self._too_large())
        if self._in_head or self.cycle is None or self.cycle.response_complete:
            self._arm_head_timer()

    # What the parser finds.

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
        return ApiError(431, f"the request's head is over {limits.max_header_bytes} bytes or {limits.max_headers} headers")

    def _unsupported_upgrade_warning(self) -> None:
        """A request for another protocol is answered in this one, and is the last: the parser drops what came behind it."""
        self.cycle.keep_alive = False
        if self.cycle.response_complete:
            self._close()

    # Answers of the connection itself.

    def send_400_response(self, msg: str) -> None:
        self._refuse(self._refusal or ApiError(400, "this is not HTTP that the server can read"))

    def _refuse(self, error: ApiError) -> None:
        """Answers what is being received, after the requests before it, and closes."""
        self._due = error
        self._stop_head_timer()
        cycle = self.cycle
        if cycle is not None and cycle.more_body:  # it is that request's body
            if self.pipeline:
                self.pipeline.popleft()  # the newest; others are before it
                return
            if cycle.response_started:  # it has its answer; one that is not whole can't be ended otherwise
                return self._close()
            cycle.disconnected = True  # whoever works for it learns that nobody waits
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
        self.transport.close()  # which first sends what is left, to a client that may not read
        self._arm_write_timer()

    def shutdown(self) -> None:
        """The server stops: a connection that waits for a request is closed."""
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
            self._refuse(ApiError(408, "the request's head came too slowly", code="timeout"))
        elif self.cycle.more_body:  # of a request that was answered before its body came
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
    """What is wrong with a request's Transfer-Encoding, where only `chunked` is known. A body whose end is unclear may hide a
    request, so nothing of it is guessed."""
    fields = [value for name, value in headers if name == b"transfer-encoding"]
    if not fields:
        return None
    codings = [coding.strip(b" \t").lower() for coding in b",".join(fields).split(b",")]
    if version == "1.0" or codings[-1] != b"chunked" or codings.count(b"chunked") > 1:
        return ApiError(400, "the request's Transfer-Encoding must be chunked")
    if len(codings) > 1:
        return ApiError(501, "no Transfer-Encoding but chunked is known here; send the body as it is")
    return None


def protocol_for(settings: ServerSettings) -> type[Any]:
    """The class for uvicorn's `http=`."""
    return type("Connection", (BoundedProtocol,), {"limits": settings})
