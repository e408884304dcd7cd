"""A server that speaks OpenAI's chat protocol from a script and serves the chat page, for tests of clients.

It streams what a test scripts, waits while the test holds an event, and records every request. No model, no torch.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path
from typing import Any

# The page's headers, as sent by the server. Trusted Types make the browser reject innerHTML and similar calls.
CSP = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; font-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
)
TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
LONGEST_WAIT = 20.0  # maximum seconds that a reply waits for its test; never reached by a test that passes


def page_folder() -> Path:
    """The folder of the page's files in the tested package, located without importing it, which would load torch."""
    spec = find_spec("deepseek_optimizer")
    assert spec is not None and spec.submodule_search_locations
    return Path(next(iter(spec.submodule_search_locations))) / "server" / "page"


@dataclass(frozen=True)
class Thought:
    """A piece of reasoning."""

    text: str


DROP = object()  # in a reply: closes the connection here, before the answer is complete


@dataclass
class Reply:
    """One scripted answer.

    Args:
        pieces: in order: str (content), `Thought`, an Event to wait for, a dict (sent unchanged as a chunk), `DROP`.
        status: other than 200 sends `error` and no stream.
        error: the body of an error response; with status 200, the object of an error event after the pieces.
        headers: further headers.
        finish: the finish reason.
        usage: further fields of the usage, such as dropped_tokens.
    """

    pieces: Sequence[Any] = ()
    status: int = 200
    error: dict[str, Any] | str | None = None
    headers: dict[str, str] = field(default_factory=dict)
    finish: str = "stop"
    usage: dict[str, Any] = field(default_factory=dict)


def error_body(message: str, kind: str = "invalid_request_error") -> dict[str, Any]:
    """An error in OpenAI's format."""
    return {"error": {"message": message, "type": kind, "param": None, "code": None}}


class FakeChatServer:
    """Serves on a free loopback port until closed. `replies` are used in order; without one, it echoes."""

    def __init__(self) -> None:
        self.models: list[dict[str, Any]] = [{"id": "tiny", "object": "model", "max_model_len": 4096}]
        self.replies: list[Reply] = []
        self.bodies: list[dict[str, Any]] = []  # bodies of the chat requests
        self.api_key: str | None = None
        self.libraries = True  # whether it serves the libraries that format answers
        self.cut = threading.Event()  # a client disconnected during its answer
        handler = type("Handler", (_Handler,), {"fake": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def __enter__(self) -> FakeChatServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Handler(BaseHTTPRequestHandler):
    fake: FakeChatServer
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        if self.path == "/v1/models":
            if self._allowed():
                self._json(200, {"object": "list", "data": self.fake.models})
            return
        name = "index.html" if self.path == "/" else self.path.removeprefix("/page/")
        file = page_folder() / name
        served = self.fake.libraries if name.startswith("vendor/") else "/" not in name
        if not served or ".." in name or not file.is_file():
            self._json(404, error_body(f"no {self.path} here"))
            return
        self._send(200, file.read_bytes(), TYPES[file.suffix] + "; charset=utf-8", {"Content-Security-Policy": CSP})

    def do_POST(self) -> None:
        data = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path != "/v1/chat/completions":
            self._json(404, error_body(f"no {self.path} here"))
            return
        body = json.loads(data)
        if not self._allowed():
            return
        self.fake.bodies.append(body)
        last = body["messages"][-1]["content"]
        reply = self.fake.replies.pop(0) if self.fake.replies else Reply([f"You said: {last}"])
        if reply.status != 200:
            self._json(reply.status, reply.error or error_body("no"), reply.headers)
            return
        try:
            self._stream(body, reply)
        except (BrokenPipeError, ConnectionResetError):
            self.fake.cut.set()

    def _allowed(self) -> bool:
        if self.fake.api_key is None or self.headers.get("Authorization") == f"Bearer {self.fake.api_key}":
            return True
        self._json(401, error_body("wrong or missing API key", "authentication_error"))
        return False

    def _stream(self, body: dict[str, Any], reply: Reply) -> None:
        self.send_response(200)
        for name, value in {"Content-Type": "text/event-stream", "Connection": "close", **reply.headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.close_connection = True
        count = 0
        for delta in self._deltas(reply.pieces):
            if delta is DROP:
                return
            count += 1
            self._event(delta if "choices" in delta else self._chunk(delta, None))
        if reply.error:
            self._event(reply.error)
            return
        self._event(self._chunk({}, reply.finish))
        if body.get("stream_options", {}).get("include_usage"):
            usage = {"prompt_tokens": 10, "completion_tokens": count, "total_tokens": 10 + count, **reply.usage}
            self._event({"choices": [], "usage": usage})
        self.wfile.write(b"data: [DONE]\n\n")

    def _deltas(self, pieces: Sequence[Any]) -> Iterator[Any]:
        for piece in pieces:
            if isinstance(piece, threading.Event):
                # Comments, which are not events, are sent meanwhile to detect a client that disconnected.
                for _ in range(int(LONGEST_WAIT / 0.02)):
                    if piece.wait(0.02):
                        break
                    self.wfile.write(b": waiting\n\n")
            elif isinstance(piece, Thought):
                yield {"reasoning_content": piece.text}
            elif isinstance(piece, str):
                yield {"content": piece}
            else:
                yield piece

    def _chunk(self, delta: dict[str, Any], finish: str | None) -> dict[str, Any]:
        choice = {"index": 0, "delta": delta, "finish_reason": finish}
        return {"id": "chatcmpl-1", "object": "chat.completion.chunk", "model": "tiny", "choices": [choice]}

    def _event(self, data: dict[str, Any]) -> None:
        self.wfile.write(b"data: " + json.dumps(data).encode() + b"\n\n")
        self.wfile.flush()

    def _json(self, status: int, body: dict[str, Any] | str, headers: dict[str, str] | None = None) -> None:
        text = body if isinstance(body, str) else json.dumps(body)
        self._send(status, text.encode(), "application/json", headers or {})

    def _send(self, status: int, data: bytes, kind: str, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(data)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)
