"""Settings of the HTTP server, and its limits."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from ..checkpoint.sentence_transformers import EmbeddingSettings
from ..errors import ConfigError
from .keys import ApiKeys
from .remote_pictures import allowed_hosts

LOCALHOST = "localhost"  # in allow_origins
_ROOT_PATH = re.compile(r"(/[A-Za-z0-9._~-]+)+")


@dataclass(frozen=True)
class ServerSettings:
    """Settings of a server. A client is an API key or, without keys, the address that a connection comes from.

    Attributes:
        host: address to listen on.
        port: port to listen on; 0: any free port.
        keys: accepted API keys; without any, requests need no key.
        allow_hosts: names accepted in the Host header, in addition to the loopback names. The header is checked if `host` is a
            loopback address or any names are given.
        allow_origins: origins whose web pages may use the API (CORS); "*" for all, "localhost" for those of this machine with
            any port.
        max_body_bytes: maximum size of a request body, in bytes. None: 4 MiB, or 48 MiB if the model accepts pictures or
            several models are served.
        max_body_bytes_per_client: maximum size of all request bodies of one client that are being received, in bytes.
        max_body_bytes_total: the same for all clients.
        max_header_bytes: maximum size of the request line and the headers together, in bytes.
        max_headers: maximum number of headers of a request.
        max_json_depth: maximum nesting depth of lists and objects in a body.
        max_connections: maximum number of open connections.
        max_answers: maximum number of answers to one request: `n` times the number of its prompts.
        header_seconds: maximum time for a client to send the headers.
        body_seconds: maximum time for a client to send the body.
        write_seconds: maximum time for which a client may leave a full send buffer unread.
        keep_alive_seconds: idle time before a connection is closed.
        request_seconds: maximum time from a request's arrival to the end of its answer.
        grammar_seconds: maximum CPU time to compile a grammar or JSON schema.
        max_file_bytes: maximum size of an uploaded file in bytes, and of its text in characters.
        max_file_bytes_per_client: memory for the texts of one client's uploaded files, including those being received.
        max_file_bytes_total: the same for all clients. Indexes built from the texts may take the same amount again.
        max_files_per_client: maximum number of files that a client may store.
        max_uploads_per_client: maximum number of files that are received from one client at the same time.
        max_uploads_total: the same for all clients.
        max_jobs_per_client: maximum number of requests of one client that wait for a tokenization, a grammar or a document.
            Each queue accepts four times as many in total.
        state_dir: folder for stored responses and batches, which survive a restart there; None: responses are in memory, and
            batches in a temporary folder.
        max_response_bytes_per_client: maximum size of the stored responses of one client, in bytes; the oldest are deleted.
        max_response_bytes_total: the same for all clients.
        response_seconds: time after its last use at which a stored response is deleted.
        file_seconds: time after which an uploaded file is deleted.
        max_batches_per_client: maximum number of batches of one client that have not ended.
        max_batch_bytes_per_client: maximum size of one client's files of batches, on disk, with those that were deleted while
            a batch still answers them. A file of requests is uploaded like any other, so `max_file_bytes` is its maximum. A
            batch whose results exceed it fails, and keeps those it has.
        max_batch_bytes_total: maximum size of all clients' files of requests. Uploads that exceed a limit are refused.
        batch_seconds: time after which batches that have ended, and their files, are deleted.
        file_read_seconds: maximum CPU time to extract the text of a file, and to decode the pictures of each of its scanned
            pages; without text recognition.
        max_scanned_pages: maximum number of pages of a file that an OCR model reads.
        upload_seconds: maximum time for a client to send a file.
        drain_seconds: grace period for requests in flight when the server stops.
        tools_format: syntax in which the model writes tool calls, a name in `chat.tools.FORMATS`; None: detected from the chat
            template.
        reasoning: whether reasoning is returned separately from the answer; None: if the chat template supports it.
        embedding: how the checkpoint's texts are embedded: pooling, prompts, dense layers.
        reranker: how a model without a classification head scores pairs of texts: "cosine" of their embeddings; "yes-no", the
            probability that a language model judges the document to answer the query; "auto": "yes-no" for a language model
            whose files or name say that it is a reranker.
        thinking: whether models that can turn their reasoning on and off reason before an answer, for requests that do not say
            (`reasoning_effort`, or a variable of the chat template); None: as the chat template decides.
        prefill_assistant: continue a chat's last message if it is the assistant's, as llama-server does. A request's
            `continue_final_message` and `add_generation_prompt` override this.
        sampling: sampling parameters for fields that a request omits, by their names in `SamplingParams`; others have OpenAI's
            defaults.
        sampling_not_thinking: the same for answers without reasoning; None: `sampling`.
        max_pictures: maximum number of pictures in a request, those of earlier turns included.
        allowed_media_domains: hosts from which pictures in requests are fetched by their addresses: names, "*" for all, and
            networks or addresses, which may be private; empty: none are fetched.
        media_seconds: maximum time to fetch a picture.
        max_answer_tokens: maximum number of tokens of an answer whose request gives none.
        model_path: path or name by which the model was loaded, for /props.
        strict: refuse requests with unknown fields or with values of another JSON type, such as numbers in quotes.
        allow_lora_loading: whether requests may load and unload LoRA adapters.
        lora_dir: the directory that contains the adapters that requests may load.
        access_log: write one line to stderr for each request.
        root_path: prefix of all paths under which a reverse proxy serves this server, such as "/llm"; it may remove it or not.
        sleep_mode: whether clients may let the server sleep by /sleep.
        idle_sleep: seconds without requests after which the server sleeps, until the next one; None: it does not.
        slots: whether /slots lists the places of the batch.
        metrics: whether /metrics is served.
        page: whether the chat page is served.
        ssl_certfile: file with the certificate chain, for TLS; None: plain HTTP.
        ssl_keyfile: file with the private key; None: in `ssl_certfile`.
        ssl_keyfile_password: of an encrypted key.
        ssl_ca_certs: file with certificates of authorities. Clients must then have a certificate issued by one of them.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    keys: ApiKeys = field(default_factory=ApiKeys)
    allow_hosts: tuple[str, ...] = ()
    allow_origins: tuple[str, ...] = ()
    max_body_bytes: int | None = None
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
    state_dir: Path | None = None
    max_response_bytes_per_client: int = 64 << 20
    max_response_bytes_total: int = 128 << 20
    response_seconds: float = 30 * 86_400.0
    file_seconds: float = 86_400.0
    max_batches_per_client: int = 100
    max_batch_bytes_per_client: int = 1 << 30
    max_batch_bytes_total: int = 4 << 30
    batch_seconds: float = 30 * 86_400.0
    file_read_seconds: float = 20.0
    max_scanned_pages: int = 100
    upload_seconds: float = 300.0
    drain_seconds: float = 30.0
    tools_format: str | None = None
    reasoning: bool | None = None
    embedding: EmbeddingSettings = field(default_factory=EmbeddingSettings)
    reranker: Literal["auto", "cosine", "yes-no"] = "auto"
    thinking: bool | None = None
    prefill_assistant: bool = False
    sampling: Mapping[str, Any] = field(default_factory=dict)
    sampling_not_thinking: Mapping[str, Any] | None = None
    max_pictures: int = 64
    allowed_media_domains: tuple[str, ...] = ()
    media_seconds: float = 10.0
    max_answer_tokens: int = 4096
    model_path: str = ""
    strict: bool = False
    allow_lora_loading: bool = False
    lora_dir: str | None = None
    access_log: bool = False
    root_path: str = ""
    sleep_mode: bool = False
    idle_sleep: float | None = None
    slots: bool = True
    metrics: bool = True
    page: bool = True
    ssl_certfile: str | None = None
    ssl_keyfile: str | None = None
    ssl_keyfile_password: str | None = field(default=None, repr=False)
    ssl_ca_certs: str | None = None

    def __post_init__(self) -> None:
        """Raises ConfigError for an invalid value."""
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"port must be from 0 to 65535, got {self.port}")
        for name in (f.name for f in fields(self) if f.name.endswith("_seconds") and f.name != "drain_seconds"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ConfigError(f"{name} must be greater than 0, got {getattr(self, name)}")
        if self.idle_sleep is not None and not 0 < self.idle_sleep < float("inf"):
            raise ConfigError(f"idle_sleep must be greater than 0, got {self.idle_sleep}")
        for name in self.allow_hosts:
            if "/" in name or not name.strip():
                raise ConfigError(f"allow_hosts: {name!r} is not a host name; leave out scheme and port")
        for origin in self.allow_origins:
            if origin not in ("*", LOCALHOST) and not origin.startswith(("http://", "https://")):
                raise ConfigError(
                    f"allow_origins: {origin!r} is not an origin; use the form https://example.com, {LOCALHOST}, or *"
                )
        allowed_hosts(self.allowed_media_domains)
        if self.root_path and not _ROOT_PATH.fullmatch(self.root_path):
            raise ConfigError(f"root_path: {self.root_path!r} is not a path; use the form /llm, without a slash at the end")
        if self.ssl_certfile is None and (self.ssl_keyfile or self.ssl_keyfile_password or self.ssl_ca_certs):
            raise ConfigError("ssl_keyfile, ssl_keyfile_password and ssl_ca_certs need ssl_certfile; give the certificate too")
        if self.reranker not in ("auto", "cosine", "yes-no"):
            raise ConfigError(f"reranker must be auto, cosine or yes-no, got {self.reranker!r}")
        if self.allow_lora_loading and self.lora_dir is None:
            raise ConfigError("allow_lora_loading: needs lora_dir (--lora-dir), the directory of adapters that may be loaded")
        if not 0 <= self.drain_seconds < float("inf"):
            raise ConfigError(f"drain_seconds must be 0 or more, got {self.drain_seconds}")
        for name in (f.name for f in fields(self) if f.name.startswith("max_")):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} must be 1 or more, got {value}")
