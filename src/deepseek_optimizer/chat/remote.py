"""Answers of a server with an OpenAI-compatible chat API: `dso serve`, or any other."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any
from urllib.parse import urlsplit

from ..errors import ConfigError, DeepSeekOptimizerError
from .conversation import Answer, Messages, StopSignal, rate

_CONNECT, _READ = 10.0, 600.0  # seconds; a long prompt may take minutes before the first word
_MAX_EVENT = 1 << 24  # bytes of one event; a larger one is not a valid answer
_MAX_ERROR = 1 << 16  # bytes read of an error's body
_REASONING = ("<think>\n", "\n</think>\n\n")  # how reasoning is displayed; it is not added to the history


class RemoteError(DeepSeekOptimizerError, OSError):
    """A server cannot be reached, rejects a request or closes the connection; the message names the remedy."""


class _StoppedError(Exception):
    """Raised in the code that waits for the answer, when a stop is requested."""


class RemoteSpeaker:
    """
    Args:
        url: http://host:port, with the path of the API if it is not /v1.
        key: API key, sent as bearer token.
        model: name of the model on the server; None: its only model.
        options: fields of the request besides model and messages, such as temperature and max_tokens.

    Raises:
        ConfigError: the URL or the key is invalid, or the server has several models.
        RemoteError: the server cannot be reached, or rejects the key.
    """

    def __init__(self, url: str, key: str | None = None, model: str | None = None, **options: Any) -> None:
        self._base = _base(url)
        if key is not None and not (key.isascii() and key.isprintable() and key.strip()):
            raise ConfigError("the API key must be printable ASCII characters")
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._options = options
        self.model = model or self._only_model()

    @property
    def base(self) -> str:
        """The URL that paths of the API are appended to, such as http://localhost:8000/v1."""
        return self._base

    def answer(self, messages: Messages, write: Callable[[str], None], stop: StopSignal) -> Answer:
        """See `Speaker`. Raises RemoteError."""
        body = {
            "model": self.model,
            "messages": messages,
            "stream": True,
            "stream_options": {"include_usage": True},
            **self._options,
        }
        reply = _Reply(write)
        try:
            with stop.calling(_raise_stopped), self._send("POST", "/chat/completions", body) as response:
                for event in _events(response.iter_bytes()):
                    reply.take(_object(event))
        except _StoppedError:
            reply.finish = "interrupted"
        if reply.finish is None:
            raise RemoteError(f"{self._base} closed the connection before the end of the answer; try again")
        return reply.answer()

    def _only_model(self) -> str:
        with self._send("GET", "/models") as response:
            data = _object(response.read()).get("data")
        names = [str(entry.get("id")) for entry in data if isinstance(entry, dict)] if isinstance(data, list) else []
        if len(names) != 1:
            raise ConfigError(
                f"{self._base} has several models; choose one with --model: {', '.join(names[:20])}"
                if names
                else f"{self._base} does not list its models; name one with --model"
            )
        return names[0]

    def _send(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        return _Exchange(method, self._base + path, self._headers, body)


class _Exchange:
    """A request whose response is read inside a `with`. Each has its own client, since an interrupted one cannot be reused."""

    def __init__(self, method: str, url: str, headers: dict[str, str], body: dict[str, Any] | None) -> None:
        self._method, self._url, self._headers, self._body = method, url, headers, body

    def __enter__(self) -> Any:
        import httpx

        self._client = httpx.Client(timeout=httpx.Timeout(_CONNECT, read=_READ), headers=self._headers)
        try:
            request = self._client.build_request(self._method, self._url, json=self._body)
            response = self._client.send(request, stream=True)
            if response.status_code != 200:
                raise _refused(response, self._url)
            return response
        except BaseException as error:
            self._client.close()
            if isinstance(error, httpx.HTTPError):
                raise _unreachable(error, self._url) from error
            raise

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        import httpx

        self._client.close()
        if isinstance(error, httpx.HTTPError):
            raise _unreachable(error, self._url) from error


class _Reply:
    """Accumulates the events of one answer."""

    def __init__(self, write: Callable[[str], None]) -> None:
        self._write = write
        self._texts: list[str] = []
        self._thinking = False
        self._times: list[float] = []
        self._usage: dict[str, Any] = {}
        self._started = time.perf_counter()
        self.finish: str | None = None

    def take(self, event: dict[str, Any]) -> None:
        if "error" in event:
            raise RemoteError(f"the server stopped the answer: {error_message(event) or 'no reason given'}")
        if isinstance(usage := event.get("usage"), dict):
            self._usage = usage
        choices = event.get("choices")
        if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
            return
        delta = choices[0].get("delta")
        delta = delta if isinstance(delta, dict) else {}
        if reasoning := _text(delta.get("reasoning_content")) or _text(delta.get("reasoning")):
            self._show(reasoning if self._thinking else _REASONING[0] + reasoning)
            self._thinking = True
        if text := _text(delta.get("content")):
            self._texts.append(text)  # before it is displayed, since a stop may be requested there
            self._show(_REASONING[1] + text if self._thinking else text)
            self._thinking = False
        self.finish = _text(choices[0].get("finish_reason")) or self.finish

    def _show(self, text: str) -> None:
        self._times.append(time.perf_counter())
        self._write(text)

    def answer(self) -> Answer:
        tokens, details = _count(self._usage.get("completion_tokens")), self._usage.get("prompt_tokens_details")
        return Answer(
            text="".join(self._texts),
            ids=[],
            finish_reason=self.finish or "stop",
            prompt_tokens=_count(self._usage.get("prompt_tokens")),
            new_tokens=tokens,
            first_token_s=self._times[0] - self._started if self._times else 0.0,
            tokens_per_s=rate(tokens, self._times[0], self._times[-1]) if self._times else 0.0,
            cached_tokens=(_count(details.get("cached_tokens")) if isinstance(details, dict) else None) or 0,
        )


def _text(value: Any) -> str:
    return value if isinstance(value, str) else ""


def _count(value: Any) -> int | None:
    return value if isinstance(value, int) else None


def _base(url: str) -> str:
    """The base URL of the API."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
        raise ConfigError(f"--url must be a URL such as http://localhost:8000, got {url!r}")
    return url.rstrip("/") + ("" if parts.path.strip("/") else "/v1")


def _raise_stopped() -> None:
    raise _StoppedError


def _events(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """The data of server-sent events, up to [DONE]. Only \\n ends a line: JSON may contain other Unicode line separators."""
    held = b""
    for chunk in chunks:
        *lines, held = (held + chunk).split(b"\n")
        if len(held) > _MAX_EVENT:
            raise RemoteError("the server sent an event that is too large for a chat answer; check --url")
        for line in lines:
            if line.startswith(b"data:"):
                data = line[5:].strip()
                if data == b"[DONE]":
                    return
                if data:
                    yield data


def _object(text: bytes) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise RemoteError("the server's response is not that of an OpenAI-compatible API; check --url") from error
    if not isinstance(value, dict):
        raise RemoteError("the server's response is not that of an OpenAI-compatible API; check --url")
    return value


def _unreachable(error: Exception, url: str) -> RemoteError:
    import httpx

    where = "{0.scheme}://{0.netloc}".format(urlsplit(url))
    if isinstance(error, (httpx.ConnectError, httpx.ConnectTimeout)):
        return RemoteError(f"{where} cannot be reached ({error}); is a server running there? Start one with `dso serve MODEL`")
    if isinstance(error, httpx.TimeoutException):
        return RemoteError(f"{where} has not responded for {_READ:.0f} s; try again, or check its log")
    return RemoteError(f"the connection to {where} failed: {error}")


def _refused(response: Any, url: str) -> RemoteError:
    """The error for a status other than 200."""
    body = b""
    for chunk in response.iter_bytes():
        body += chunk
        if len(body) > _MAX_ERROR:
            break
    try:
        message = error_message(json.loads(body))
    except ValueError:
        message = ""
    status, detail = response.status_code, f": {message}" if message else ""
    if status in (401, 403):
        return RemoteError(f"the server rejects the API key{detail}; pass another one with --api-key or OPENAI_API_KEY")
    if status == 404:
        return RemoteError(f"the server does not know this model or path{detail or f': {url}'}; check --model and --url")
    if status in (429, 503):
        after = response.headers.get("retry-after", "")
        return RemoteError(f"the server is busy{detail}; try again {f'in {after} s' if after.isdigit() else 'later'}")
    if 300 <= status < 400:
        return RemoteError(f"the server redirects to another address ({status}); use that address in --url")
    return RemoteError(f"the server {'failed' if status >= 500 else 'rejects the request'} ({status}){detail}")


def error_message(body: Any) -> str:
    """The message in an error's body, in the formats of OpenAI, FastAPI and others."""
    message = body.get("error", body.get("detail", body.get("message"))) if isinstance(body, dict) else None
    message = message.get("message") if isinstance(message, dict) else message
    return "".join(c for c in " ".join(message.split())[:500] if c.isprintable()) if isinstance(message, str) else ""
