"""Settings of the HTTP server, and its limits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from ..errors import ConfigError
from .keys import ApiKeys


@dataclass(frozen=True)
class ServerSettings:
    """Settings of a server. A client is an API key or, without keys, the address that a connection comes from.

    Attributes:
        host, port: address to listen at. Port 0 takes any free port.
        keys: accepted API keys; without any, requests need no key.
        allow_hosts: names accepted in a Host header, besides the loopback names. Checked if `host` is a loopback address or
            any names are given.
        allow_origins: origins of web pages that may read answers (CORS); "*" for all.
        max_body_bytes: bytes of one request's body.
        max_body_bytes_per_client, max_body_bytes_total: bytes of the bodies that are being read at the same time, for one
            client and for all clients.
        max_header_bytes: bytes of a request line and its headers together.
        max_headers: headers of a request.
        max_json_depth: nesting depth of lists and objects in a body.
        max_connections: open connections.
        max_answers: answers to one request: `n` times the number of its prompts.
        header_seconds, body_seconds: time a client has to send the headers, and the body.
        write_seconds: time a client may leave a full send buffer unread.
        keep_alive_seconds: idle time before a connection is closed.
        request_seconds: time from a request's arrival to the end of its answer.
        grammar_seconds: CPU time for compiling a grammar or JSON schema.
        max_file_bytes: bytes of an uploaded file, and characters of the text in it.
        max_file_bytes_per_client, max_file_bytes_total: memory for the texts of uploaded files, including those that are still
            being received. Indexes built from them may take `max_file_bytes_total` again.
        max_files_per_client: files that a client may store.
        max_uploads_per_client, max_uploads_total: files that are received at the same time, from one client and from all.
        max_jobs_per_client: requests of one client that may wait for tokenising, for grammars, or for documents. A queue
            accepts four times as many in total.
        file_seconds: time after which an uploaded file is deleted.
        file_read_seconds: CPU time for reading a file's text.
        upload_seconds: time a client has to send a file.
        drain_seconds: grace period for in-flight requests when the server is stopped.
        tools_format: how the model writes tool calls, a name in `chat.tools.FORMATS`; None: recognised by its chat template.
        reasoning: whether reasoning is separated from the answer; None: where the chat template supports it.
        sampling: the model's recommended sampling parameters, for fields that a request omits.
        access_log: write one line to stderr for each request.
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
        """Raises ConfigError for an invalid value."""
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"port must be from 0 to 65535, got {self.port}")
        for name in (f.name for f in fields(self) if f.name.endswith("_seconds") and f.name != "drain_seconds"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ConfigError(f"{name} must be greater than 0, got {getattr(self, name)}")
        for name in self.allow_hosts:
            if "/" in name or not name.strip():
                raise ConfigError(f"allow_hosts: {name!r} is not a host name; leave out scheme and port")
        for origin in self.allow_origins:
            if origin != "*" and not origin.startswith(("http://", "https://")):
                raise ConfigError(f"allow_origins: {origin!r} is not an origin; use the form https://example.com, or *")
        if not 0 <= self.drain_seconds < float("inf"):
            raise ConfigError(f"drain_seconds must be 0 or more, got {self.drain_seconds}")
        for name in (f.name for f in fields(self) if f.name.startswith("max_")):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be 1 or more, got {getattr(self, name)}")
