"""uvicorn's HTTP protocol with what it lacks: bounds on requests' heads, and on clients that don't read.

A head that is too large is answered with 431, one that does not come with 408, a connection too many with 503, and one whose
client leaves a full buffer unread is cut.
"""

from __future__ import annotations

import asyncio
from typing import Any

import orjson
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from .problems import ApiError
from .settings import ServerSettings

_STATUS = {400: b"400 Bad Request", 408: b"408 Request Timeout", 431: b"431 Request Header Fields Too Large",
           503: b"503 Service Unavailable"}  # fmt: skip


class _HeadTooLarge(Exception):
    """Stops the parser."""


class BoundedProtocol(HttpToolsProtocol):
    """One connection. Made by `protocol_for`, which gives it its limits."""

    limits: ServerSettings

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._in_head = False
        self._head_bytes = 0
        self._refusal: ApiError | None = None
        self._head_timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None
        if len(self.connections) > self.limits.most_connections:
            self._refuse(ApiError(503, "too many connections", code="unavailable", headers={"Retry-After": "1"}))
        else:
            self._arm_head_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_head_timer()
        self._stop_write_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        begun = self._in_head
        super().data_received(data)
        if self.transport.is_closing():
            return
        if self._in_head:
            self._head_bytes += len(data) if begun else 0  # of a head's first piece, no more than a read's worth goes uncounted
            if self._head_bytes > self.limits.most_header_bytes:
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
        if len(self.headers) > self.limits.most_headers:
            self._refusal = self._too_large()
            raise _HeadTooLarge

    def on_headers_complete(self) -> None:
        self._in_head = False
        self._stop_head_timer()
        super().on_headers_complete()

    def _count(self, size: int) -> None:
        self._parsed_bytes += size
        if self._parsed_bytes > self.limits.most_header_bytes:
            self._refusal = self._too_large()
            raise _HeadTooLarge

    def _too_large(self) -> ApiError:
        limits = self.limits
        return ApiError(431, f"the request's head is over {limits.most_header_bytes} bytes or {limits.most_headers} headers")

    # Answers of the connection itself.

    def send_400_response(self, msg: str) -> None:
        self._refuse(self._refusal or ApiError(400, "this is not HTTP that the server can read"))

    def _refuse(self, error: ApiError) -> None:
        """Answers where no answer is on its way that this would be in the middle of, and closes."""
        if self.cycle is None or self.cycle.response_complete:
            body = orjson.dumps(error.body())
            lines = [b"HTTP/1.1 " + _STATUS[error.status], b"content-type: application/json", b"connection: close",
                     b"content-length: %d" % len(body)]  # fmt: skip
            lines += [f"{name}: {value}".encode("latin-1") for name, value in error.headers.items()]
            self.transport.write(b"\r\n".join((*lines, b"", body)))
        self._close()

    def _close(self) -> None:
        self._stop_head_timer()
        self.transport.close()  # which first sends what is left, to a client that may not read
        self._arm_write_timer()

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
        else:  # between requests
            self._close()

    def timeout_keep_alive_handler(self) -> None:
        self._close()

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


def protocol_for(settings: ServerSettings) -> type[Any]:
    """The class for uvicorn's `http=`."""
    return type("Connection", (BoundedProtocol,), {"limits": settings})
