"""A running server on its own port in a thread, for tests over sockets."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Callable, Coroutine
from dataclasses import replace
from typing import Any

import httpx

from deepseek_optimizer.engine.grammar.compiler import GrammarCompiler
from deepseek_optimizer.server.app import create_app
from deepseek_optimizer.server.run import Server, listener
from deepseek_optimizer.server.settings import ServerSettings


class LiveServer:
    """`with LiveServer(engine, settings) as live: live.client.get("/health")`."""

    def __init__(
        self, engine: Any, settings: ServerSettings | None = None, tracer: Any = None, app: Any = None,
        grammars: GrammarCompiler | None = None,
    ):  # fmt: skip
        """
        Args:
            app: the application, if it is not that of one engine.
            grammars: the compiler of several servers, since each starts a process that imports torch; the caller closes it.
        """
        self.engine = engine
        self.settings = replace(settings or ServerSettings(), port=0)
        self.app = app or create_app(engine, self.settings, tracer)
        self._own_grammars = None
        if grammars is not None:
            self._own_grammars, self.app.state.server.grammars = self.app.state.server.grammars, grammars
        self.server = Server(self.app, self.settings)
        self.sock = listener("127.0.0.1", 0)
        self.port = self.sock.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.thread = threading.Thread(target=self.server.run, args=([self.sock],), daemon=True)
        # Unlimited: a pool that closes connections races with its threads.
        every = httpx.Limits(max_connections=None, max_keepalive_connections=None)
        self.client = httpx.Client(base_url=self.url, timeout=30, limits=every)

    def __enter__(self) -> LiveServer:
        self.thread.start()
        wait_for(lambda: self.server.started, 30)
        return self

    def __exit__(self, *_: Any) -> None:
        self.client.close()
        if self._own_grammars is not None:
            self.app.state.server.grammars = self._own_grammars
        self.server.should_exit = True
        self.thread.join(20)
        assert not self.thread.is_alive()

    def call(self, work: Callable[[], Any]) -> Any:
        """Runs `work` on the server's event loop."""

        async def run() -> Any:
            return work()

        return asyncio.run_coroutine_threadsafe(run(), self.server._loop).result(10)

    def wait(self, work: Callable[[], Coroutine[Any, Any, Any]]) -> Any:
        """Awaits `work()` on the server's event loop."""
        return asyncio.run_coroutine_threadsafe(work(), self.server._loop).result(10)

    def connect(self, timeout: float = 10) -> socket.socket:
        """A plain socket to the server."""
        return socket.create_connection(("127.0.0.1", self.port), timeout)

    def raw(self, data: bytes, timeout: float = 10) -> bytes:
        """Sends bytes; returns everything received until the server closes."""
        with self.connect(timeout) as sock:
            sock.sendall(data)
            return read_all(sock)


def read_all(sock: socket.socket) -> bytes:
    pieces = []
    try:
        while piece := sock.recv(65536):
            pieces.append(piece)
    except ConnectionResetError:
        pass
    return b"".join(pieces)


def wait_for(condition: Callable[[], Any], seconds: float = 10.0) -> None:
    """Waits until the condition is true; fails after `seconds`."""
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "the condition was not met in time"
        time.sleep(0.005)


def assert_error(response: httpx.Response, status: int, param: str | None = None) -> None:
    """Asserts an error in OpenAI's format, without paths, addresses or tracebacks."""
    assert response.status_code == status, response.text
    error = response.json()["error"]
    more = {"n_prompt_tokens", "n_ctx"} if error["code"] == "context_length_exceeded" else set()
    assert set(error) == {"message", "type", "param", "code"} | more
    assert error["message"] and "Traceback" not in response.text and "/work" not in response.text and ".py" not in response.text
    assert " 0x" not in response.text
    if param is not None:
        assert error["param"] == param, error
