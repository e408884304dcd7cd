"""What a server may be told, with its limits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..errors import ConfigError
from .http.keys import ApiKeys


@dataclass(frozen=True)
class ServerSettings:
    """
    Attributes:
        host, port: to listen at. Port 0: any that is free.
        keys: who may ask. None asked for where it holds none.
        allow_hosts: names that a Host header may give, beside the loopback names. Checked where `host` is a loopback address,
            or where any are given.
        allow_origins: of web pages that may read answers (CORS); "*" for all.
        max_body_bytes: of one request's body.
        max_body_bytes_per_client, max_body_bytes_total: of the bodies of a client that are being read at once, and of all. A client is
            a key, or an address where no keys are asked for.
        max_header_bytes: of a request's line and headers together; max_headers: how many.
        max_json_depth: of lists and objects in each other.
        max_connections: open at once.
        max_answers: of one request: `n` times its prompts.
        header_seconds, body_seconds: that a client may take to send these.
        write_seconds: that it may leave a full buffer unread.
        keep_alive_seconds: that a connection may wait for its next request.
        request_seconds: from a request's arrival to the end of its answer.
        grammar_seconds: of CPU time that compiling what an answer must keep to may take.
        max_file_bytes: of a file that is sent, and characters of the text in it.
        max_file_bytes_per_client, max_file_bytes_total: that the texts of all files of a key, and of all files, may take in memory, with
            those that are coming in. What is made of them to answer from may take `max_file_bytes_total` again.
        max_files_per_client: files of a key; max_uploads_per_client, max_uploads_total: of a client, and of all, that are received at once.
        max_jobs_per_client: requests of a client that may wait for a queue's work: tokenising, grammars, documents. In all of a queue
            there may be four times as many.
        file_seconds: after which a file is let go of.
        file_read_seconds: of CPU time that reading a file's text may take.
        upload_seconds: that a client may take to send a file.
        drain_seconds: that requests in flight have when the server is told to stop.
        tools_format: how the model writes tool calls, a name of `chat.tools.FORMATS`; None: by its chat template.
        reasoning: whether thoughts are told apart from answers; None: where the chat template has them.
        sampling: what the model's authors chose, for fields that a request leaves out.
        access_log: a line on stderr for each request.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    keys: ApiKeys = field(default_factory=ApiKeys)
    allow_hosts: tuple[str, ...] = ()
    allow_origins: tuple[str, ...] = ()
    max_body_bytes: int = 4 << 20
    max_body_bytes_per_client: int = 64 << 20
    max_body_bytes_total: int = 128 << 20
    max_header_bytes: int = 32 << 10
    max_headers: int = 100
    max_json_depth: int = 100
    max_connections: int = 4096
    max_answers: int = 64
    header_seconds: float = 10.0
    body_seconds: float = 30.0
    write_seconds: float = 60.0
    keep_alive_seconds: float = 30.0
    request_seconds: float = 600.0
    grammar_seconds: float = 5.0
    max_file_bytes: int = 32 << 20
    max_file_bytes_per_client: int = 128 << 20
    max_file_bytes_total: int = 256 << 20
    max_files_per_client: int = 1000
    max_uploads_per_client: int = 64
    max_uploads_total: int = 128
    max_jobs_per_client: int = 512
    file_seconds: float = 86_400.0
    file_read_seconds: float = 20.0
    upload_seconds: float = 300.0
    drain_seconds: float = 30.0
    tools_format: str | None = None
    reasoning: bool | None = None
    sampling: Mapping[str, Any] = field(default_factory=dict)
    access_log: bool = False

    def __post_init__(self) -> None:
        """Raises ConfigError for a value that no server can have."""
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"port must be from 0 to 65535, got {self.port}")
        for name in (
            "header_seconds",
            "body_seconds",
            "write_seconds",
            "keep_alive_seconds",
            "request_seconds",
            "grammar_seconds",
            "file_seconds",
            "file_read_seconds",
            "upload_seconds",
        ):
            if not 0 < getattr(self, name) < float("inf"):
                raise ConfigError(f"{name} must be above 0, got {getattr(self, name)}")
        for name in self.allow_hosts:
            if "/" in name or not name.strip():
                raise ConfigError(f"allow_hosts: {name!r} is not a host's name; give it without scheme and port")
        for origin in self.allow_origins:
            if origin != "*" and not origin.startswith(("http://", "https://")):
                raise ConfigError(f"allow_origins: {origin!r} is no web page's origin; give https://example.com, or *")
        if not 0 <= self.drain_seconds < float("inf"):
            raise ConfigError(f"drain_seconds must be 0 or more, got {self.drain_seconds}")
        for name in ("max_body_bytes", "max_body_bytes_per_client", "max_body_bytes_total", "max_header_bytes", "max_headers",
                     "max_json_depth", "max_file_bytes", "max_file_bytes_per_client", "max_file_bytes_total"):  # fmt: skip
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be 1 or more, got {getattr(self, name)}")
        for name in (
            "max_connections",
            "max_answers",
            "max_files_per_client",
            "max_uploads_per_client",
            "max_uploads_total",
            "max_jobs_per_client",
        ):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be 1 or more, got {getattr(self, name)}")
