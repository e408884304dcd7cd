"""The server process: uvicorn with this package's limits and shutdown.

After the first SIGTERM or SIGINT, new requests are refused and requests in flight have `drain_seconds` to finish; then the
process exits with status 0. After the second, it exits at once. If the engine stops by itself (with several models, one of the
engines), the process ends in the same way, but with an error, so that whatever supervises it starts it again.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import socket
import ssl
import sys
from collections.abc import Awaitable, Callable
from types import FrameType
from typing import Any

import uvicorn
from fastapi import FastAPI

from ..errors import ConfigError, EngineDeadError
from ..longdoc.recognized import PageReader
from ..system.interpreter import switch_often
from ..system.open_files import raise_file_limit
from ..system.sandbox.platforms import PLATFORMS, here
from .app import create_app
from .engine_death import engine_death
from .http.connections import protocol_for
from .http.tracing import Tracer
from .pool.model_pool import ModelPool
from .pool_app import create_pool_app
from .settings import ServerSettings
from .state import ServerState

logger = logging.getLogger("deepseek_optimizer.server")
_LAST_BYTES = 2.0  # seconds that clients have to read their answers after these were written


class Server(uvicorn.Server):
    """uvicorn's server for the application.

    Args:
        app: the result of `create_app`.
        settings: the server's.
        banner: called with host and port when the server listens.
        death: called when the server listens; the server ends when what it returns does, which is then `failure`.

    Attributes:
        failure: why the server ended, unless it was asked to.
    """

    def __init__(
        self,
        app: Any,
        settings: ServerSettings,
        banner: Callable[[str, int], None] | None = None,
        death: Callable[[], Awaitable[EngineDeadError]] | None = None,
    ) -> None:
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
                proxy_headers=False,  # X-Forwarded-For must not change the address by which clients are told apart
                timeout_keep_alive=settings.keep_alive_seconds,  # type: ignore[arg-type]  # a float works
                timeout_graceful_shutdown=3,
                ssl_certfile=settings.ssl_certfile,
                ssl_keyfile=settings.ssl_keyfile,
                ssl_keyfile_password=settings.ssl_keyfile_password,
                ssl_ca_certs=settings.ssl_ca_certs,
                ssl_cert_reqs=ssl.CERT_REQUIRED if settings.ssl_ca_certs else ssl.CERT_NONE,
            )
        )
        self._state: ServerState | ModelPool = app.state.server
        self._stopping: asyncio.Task[None] | None = None
        self._banner, self._death = banner, death
        self._watching: asyncio.Future[None] | None = None
        self.failure: EngineDeadError | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Handles a signal for uvicorn. Default handlers are not called, since they would end the process."""
        if self._state.draining:
            os._exit(128 + sig)  # no clean-up, which could take time; worker processes exit when their pipes close
        self._state.draining = True
        self._loop.call_soon_threadsafe(self._begin_to_stop)

    async def serve(self, sockets: Any = None) -> None:
        self._loop = asyncio.get_running_loop()
        try:
            await super().serve(sockets)
        finally:
            if self._watching is not None:
                self._watching.cancel()

    async def startup(self, sockets: Any = None) -> None:
        await super().startup(sockets)
        if self._banner is not None:
            self._banner(*self.address)
        if self._death is not None:
            self._watching = asyncio.ensure_future(self._watch(self._death))

    async def _watch(self, death: Callable[[], Awaitable[EngineDeadError]]) -> None:
        failure = await death()
        if not self._state.draining:  # otherwise it ends already, because it was asked to
            self.failure, self._state.draining = failure, True
            self._begin_to_stop()

    @property
    def address(self) -> tuple[str, int]:
        """Host and port; valid once the server listens."""
        name = self.servers[0].sockets[0].getsockname()
        return name[0], name[1]

    def stop(self) -> None:
        """Begins a graceful shutdown, as the first signal does. Thread-safe."""
        self._state.draining = True
        self._loop.call_soon_threadsafe(self._begin_to_stop)

    def _begin_to_stop(self) -> None:
        if self._stopping is None:
            self._stopping = self._loop.create_task(self._stop())

    async def _stop(self) -> None:
        if self.failure is None:
            print("dso: stopping when requests in flight are done; a second signal stops at once", file=sys.stderr, flush=True)
        else:
            logger.error("%s", self.failure)
        await self._state.batches.stop()  # they continue after a restart
        try:
            if not await self._state.drain(self._state.settings.drain_seconds):
                logger.warning(
                    "requests were still in flight after %g s and were cancelled", self._state.settings.drain_seconds
                )
            await self._last_bytes()
        finally:
            self.should_exit = True

    async def _last_bytes(self) -> None:
        """Waits until clients have read their answers, then closes the remaining connections."""
        for _ in range(int(_LAST_BYTES / 0.05)):
            if not self.server_state.tasks:
                break
            await asyncio.sleep(0.05)
        for connection in list(self.server_state.connections):
            cycle, transport = connection.cycle, connection.transport  # type: ignore[union-attr]
            if cycle is not None and not cycle.response_complete:
                transport.abort()


def listener(host: str, port: int) -> socket.socket:
    """Returns a socket bound to an address. It does not listen yet, so that clients are refused, and do not hang, until the
    server is ready.

    Raises:
        OSError: the address cannot be bound.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        if hasattr(socket, "SO_EXCLUSIVEADDRUSE"):  # Windows, where SO_REUSEADDR lets another process take a port in use
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_EXCLUSIVEADDRUSE, 1)
        else:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((host, port))
    except OSError as error:
        sock.close()
        raise OSError(f"cannot listen at {host}:{port}: {error.strerror}") from None
    return sock


def check_tls(settings: ServerSettings) -> None:
    """Checks the files of TLS, so that an error is reported before a model is loaded.

    Raises:
        ConfigError: a file cannot be read, the key does not belong to the certificate, or the password is wrong.
    """
    if settings.ssl_certfile is None:
        return
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    password = settings.ssl_keyfile_password or ""  # not None, for which OpenSSL would ask at the terminal
    try:
        context.load_cert_chain(settings.ssl_certfile, settings.ssl_keyfile, lambda: password)
        if settings.ssl_ca_certs is not None:
            context.load_verify_locations(settings.ssl_ca_certs)
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(f"--ssl-certfile, --ssl-keyfile or --ssl-ca-certs cannot be used: {error}") from None


def serve(
    engine: Any,
    settings: ServerSettings,
    sock: socket.socket,
    banner: Callable[[str, int], None],
    tracer: Tracer | None = None,
    ocr: PageReader | None = None,
) -> None:
    """Serves until a signal stops the process.

    Args:
        engine: an `AsyncEngine` that has not been started.
        settings: the server's.
        sock: the result of `listener`.
        banner: called with host and port when the server listens.
        tracer: exports traces.
        ocr: reads scanned pages of uploaded files; None: they are reported.

    Raises:
        EngineDeadError: the engine has stopped by itself; all requests have got an answer.
    """
    raise_file_limit()
    app = create_app(engine, settings, tracer, ocr)
    app.state.server.warm_up()
    run(app, settings, sock, banner, lambda: engine_death(lambda: {"its engine": engine}))


def serve_models(pool: ModelPool, sock: socket.socket, banner: Callable[[str, int], None]) -> None:
    """Serves several models until a signal stops the process.

    Args:
        pool: the models, none of which is loaded yet.
        sock, banner: as for `serve`.

    Raises:
        EngineDeadError: the engine of a model has stopped by itself; all requests, of other models too, have got an answer.
    """

    def engines() -> dict[str, Any]:
        return {f"the engine of {name}": engine for name, engine in pool.engines.items()}

    raise_file_limit()
    run(create_pool_app(pool), pool.settings, sock, banner, lambda: engine_death(engines))


def run(
    app: FastAPI,
    settings: ServerSettings,
    sock: socket.socket,
    banner: Callable[[str, int], None],
    death: Callable[[], Awaitable[EngineDeadError]] | None = None,
) -> None:
    """Runs an application until a signal stops the process, or `death` has ended; arguments as for `Server` and `serve`.

    Raises:
        EngineDeadError: the result of `death`.
    """
    if (unenforced := PLATFORMS[here()]().unenforced) is not None:
        logger.warning("%s; serve clients that you trust only", unenforced)
    switch_often()
    gc.freeze()  # existing objects live on; a collection that visits them takes a tenth of a second
    server = Server(app, settings, banner, death)
    server.run([sock])
    if server.failure is not None:
        raise server.failure
