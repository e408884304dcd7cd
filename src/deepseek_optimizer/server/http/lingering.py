"""Closing a connection such that a client that is still sending can read the response.

Closing a socket with unread bytes resets the connection, and the reset may overtake the response. Therefore the response is
sent, the sending side is shut down, and what the client still sends is read and discarded, up to limits of time and size, until
the client closes the connection.
"""

from __future__ import annotations

import asyncio
from typing import Any

_SILENT_SECONDS = 2.0  # after that long without a byte from the client, the connection is closed


class LingeringTransport:
    """Wraps a transport and changes `close`, which lingers; everything else is delegated.

    Args:
        inner: a transport of asyncio or uvloop.
        seconds: maximum time of lingering.
        max_bytes: maximum number of bytes that are read and discarded.
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
        """Sends the data that was written, then lingers."""
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
        """Counts bytes that were received while lingering."""
        self._left -= size
        if self._left < 0 or self._loop.time() >= self._deadline:
            self.close_now()
        else:
            self._arm()

    def close_now(self) -> None:
        """Sends the data that was written and closes the connection."""
        self.forget()
        self._inner.close()

    def forget(self) -> None:
        """Stops the timer, when the connection is lost."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _arm(self) -> None:
        self.forget()
        until = min(self._deadline, self._loop.time() + _SILENT_SECONDS)
        self._timer = self._loop.call_at(until, self.close_now)
