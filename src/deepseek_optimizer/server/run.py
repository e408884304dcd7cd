"""The server as a process: uvicorn with our limits, and how it stops.

The first SIGTERM or SIGINT: no new requests are taken, those in flight have `drain_seconds`, then the process ends with
status 0. The second: it ends at once.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import resource
import socket
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import uvicorn

from .app import create_app
from .http.connections import protocol_for
from .settings import ServerSettings
from .state import ServerState

logger = logging.getLogger("deepseek_optimizer.server")
_SWITCH = 1e-3  # seconds that a thread in Python may keep the engine and the event loop waiting
_LAST_BYTES = 2.0  # seconds that clients have, once their answers are written, to read them


class Server(uvicorn.Server):
    """
    Args:
        app: of `create_app`.
        banner: called with the address once it listens.
    """

    def __init__(self, app: Any, settings: ServerSettings, banner: Callable[[str, int], None] | None = None) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                http=protocol_for(settings),
                ws="none",
                lifespan="on",
                log_config=None,
                log_level="warning",
                access_log=False,
                server_header=False,
                proxy_headers=False,  # whose turn it is goes by the connection's address, which X-Forwarded-For must not change
                timeout_keep_alive=settings.keep_alive_seconds,  # type: ignore[arg-type]  # a float will do
                timeout_graceful_shutdown=3,
            )
        )
        self._state: ServerState = app.state.server
        self._stopping: asyncio.Task[None] | None = None
        self._banner = banner

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Of uvicorn: a signal came. Not handed on to the default handlers, which would end the process with the signal."""
        if self._state.draining:
            os._exit(128 + sig)  # no clean-up that could take time; our processes end with the pipes to them
        self._state.draining = True
        self._loop.call_soon_threadsafe(self._begin_to_stop)

    async def serve(self, sockets: Any = None) -> None:
        self._loop = asyncio.get_running_loop()
        await super().serve(sockets)

    async def startup(self, sockets: Any = None) -> None:
        await super().startup(sockets)
        if self._banner is not None:
            self._banner(*self.address)

    @property
    def address(self) -> tuple[str, int]:
        """Where it listens, once it does."""
        found = self.servers[0].sockets[0].getsockname()
        return found[0], found[1]

    def stop(self) -> None:
        """As the first signal does. From any thread."""
        self._state.draining = True
        self._loop.call_soon_threadsafe(self._begin_to_stop)

    def _begin_to_stop(self) -> None:
        if self._stopping is None:
            self._stopping = self._loop.create_task(self._stop())

    async def _stop(self) -> None:
        print("dso: stopping; requests in flight may end. Once more stops at once.", file=sys.stderr, flush=True)
        try:
            if not await self._state.engine.drain(self._state.settings.drain_seconds):
                logger.warning("requests were still in flight after %g s and were ended", self._state.settings.drain_seconds)
            await self._last_bytes()
        finally:
            self.should_exit = True

    async def _last_bytes(self) -> None:
        """Waits for answers to be read, then cuts whoever does not."""
        for _ in range(int(_LAST_BYTES / 0.05)):
            if not self.server_state.tasks:
                break
            await asyncio.sleep(0.05)
        for connection in list(self.server_state.connections):
            cycle, transport = connection.cycle, connection.transport  # type: ignore[union-attr]
            if cycle is not None and not cycle.response_complete:
                transport.abort()


def raise_file_limit() -> None:
    """As many connections as the system lets a process have."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 65_536) if hard != resource.RLIM_INFINITY else 65_536, hard))


def listener(host: str, port: int) -> socket.socket:
    """A socket bound to an address. It does not listen yet: until the server does, clients are refused and do not hang.

    Raises:
        OSError: nobody can listen there.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((host, port))
    except OSError as error:
        sock.close()
        raise OSError(f"can't listen at {host}:{port}: {error.strerror}") from None
    return sock


def serve(engine: Any, settings: ServerSettings, sock: socket.socket, banner: Callable[[str, int], None]) -> None:
    """Serves until a signal ends it.

    Args:
        engine: an `AsyncEngine`, not started yet.
        sock: of `listener`.
        banner: called with the address once it listens.
    """
    raise_file_limit()
    app = create_app(engine, settings)
    app.state.server.warm_up()
    sys.setswitchinterval(_SWITCH)
    gc.freeze()  # what is there now stays: no collection need look at it, which would take a tenth of a second
    Server(app, settings, banner).run([sock])
