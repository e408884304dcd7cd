"""Closing a connection so that the client can read its answer while it is still sending.

A socket that is closed with bytes unread resets the connection, and the reset may overtake the answer. So the answer is sent
and the sending side shut, and what the client still sends is read and dropped, within bounds of time and size, until it closes.
"""

from __future__ import annotations

import asyncio
from typing import Any

_SILENT_SECONDS = 2.0  # without a byte from the client, after which nothing more is expected


class LingeringTransport:
    """A transport whose `close` lingers; in all else the one within.

    Args:
        inner: of asyncio or uvloop.
        seconds: that lingering may take.
        max_bytes: that are read and dropped.
    """

    def __init__(self, inner: asyncio.Transport, seconds: float, max_bytes: int) -> None:
        self._inner, self._seconds, self._left = inner, seconds, max_bytes
        self._loop = asyncio.get_running_loop()
        self._deadline = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self.lingering = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def is_closing(self) -> bool:
        return self.lingering or self._inner.is_closing()

    def write(self, data: bytes) -> None:
        if not self.lingering:
            self._inner.write(data)

    def close(self) -> None:
        """Sends what is written and lingers."""
        if self.is_closing():
            return
        if not self._inner.can_write_eof():
            return self._inner.close()
        self.lingering = True
        self._inner.write_eof()
        self._inner.resume_reading()
        self._deadline = self._loop.time() + self._seconds
        self._arm()

    def discard(self, size: int) -> None:
        """Of bytes that came while lingering."""
        self._left -= size
        if self._left < 0 or self._loop.time() >= self._deadline:
            self.close_now()
        else:
            self._arm()

    def close_now(self) -> None:
        """Sends what is written and closes."""
        self.forget()
        self._inner.close()

    def forget(self) -> None:
        """The connection is gone."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _arm(self) -> None:
        self.forget()
        until = min(self._deadline, self._loop.time() + _SILENT_SECONDS)
        self._timer = self._loop.call_at(until, self.close_now)
