"""Answers of a server that speaks OpenAI's chat API: `dso serve`, or any other."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any
from urllib.parse import urlsplit

from ..errors import ConfigError, DeepSeekOptimizerError
from .conversation import Answer, Messages, StopSignal, rate

_CONNECT, _READ = 10.0, 600.0  # seconds; a long prompt may take its time before the first word
_MAX_EVENT = 1 << 24  # bytes of one event: more is no answer
_MAX_ERROR = 1 << 16  # bytes of an error's body that are read
_THOUGHTS = ("<think>\n", "\n</think>\n\n")  # how thoughts are shown, and left out of the history


class RemoteError(DeepSeekOptimizerError, OSError):
    """A server cannot be reached, refuses a request or breaks off; the message says what to do."""


class _StoppedError(Exception):
    """Raised where the answer stands waiting, by whoever asks it to stop."""


class RemoteSpeaker:
    """
    Args:
        url: http://host:port, or with the path of the API where that is not /v1.
        key: sent as bearer token.
        model: its name there; None: the only one that the server has.
        options: fields of the request beside model and messages, such as temperature and max_tokens.

    Raises:
        ConfigError: the URL or the key is none, or the server has several models.
        RemoteError: the server cannot be reached, or refuses the key.
    """

    def __init__(self, url: str, key: str | None = None, model: str | None = None, **options: Any) -> None:
        self._base = _base(url)
        if key is not None and not (key.isascii() and key.isprintable() and key.strip()):
            raise ConfigError("the API key must be printable ASCII characters")
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._options = options
        self.model = model or self._only_model()

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
            raise RemoteError(f"{self._base} broke the answer off")
        return reply.answer()

    def _only_model(self) -> str:
        with self._send("GET", "/models") as response:
            data = _object(response.read()).get("data")
        names = [str(entry.get("id")) for entry in data if isinstance(entry, dict)] if isinstance(data, list) else []
        if len(names) != 1:
            raise ConfigError(
                f"{self._base} has several models, name one with --model: {', '.join(names[:20])}"
                if names
                else f"{self._base} does not say which models it has; name one with --model"
            )
        return names[0]

    def _send(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        return _Exchange(method, self._base + path, self._headers, body)


class _Exchange:
    """A request whose response is read inside a `with`. A client each: one that was interrupted is not used again."""

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
    """What the events of one answer add up to."""

    def __init__(self, write: Callable[[str], None]) -> None:
        self._write = write
        self._pieces: list[str] = []
        self._thinking = False
        self._times: list[float] = []
        self._usage: dict[str, Any] = {}
        self._started = time.perf_counter()
        self.finish: str | None = None

    def take(self, event: dict[str, Any]) -> None:
        if "error" in event:
            raise RemoteError(f"the server broke off: {_message(event) or 'it does not say why'}")
        if isinstance(usage := event.get("usage"), dict):
            self._usage = usage
        choices = event.get("choices")
        if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
            return
        delta = choices[0].get("delta")
        delta = delta if isinstance(delta, dict) else {}
        if thought := _text(delta.get("reasoning_content")) or _text(delta.get("reasoning")):
            self._show(thought if self._thinking else _THOUGHTS[0] + thought)
            self._thinking = True
        if text := _text(delta.get("content")):
            self._pieces.append(text)  # before it is shown, which is where a stop may be asked for
            self._show(_THOUGHTS[1] + text if self._thinking else text)
            self._thinking = False
        self.finish = _text(choices[0].get("finish_reason")) or self.finish

    def _show(self, text: str) -> None:
        self._times.append(time.perf_counter())
        self._write(text)

    def answer(self) -> Answer:
        tokens, details = _count(self._usage.get("completion_tokens")), self._usage.get("prompt_tokens_details")
        return Answer(
            text="".join(self._pieces),
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
    """Where the API's paths begin."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
        raise ConfigError(f"--url must be like http://localhost:8000, got {url!r}")
    return url.rstrip("/") + ("" if parts.path.strip("/") else "/v1")


def _raise_stopped() -> None:
    raise _StoppedError


def _events(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """The data of server-sent events, up to [DONE]. Lines end at newlines alone: JSON may hold what else Unicode calls one."""
    held = b""
    for chunk in chunks:
        *lines, held = (held + chunk).split(b"\n")
        if len(held) > _MAX_EVENT:
            raise RemoteError("the server sends what is no answer of a chat")
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
        raise RemoteError("the server does not answer as OpenAI's API does") from error
    if not isinstance(value, dict):
        raise RemoteError("the server does not answer as OpenAI's API does")
    return value


def _unreachable(error: Exception, url: str) -> RemoteError:
    import httpx

    where = "{0.scheme}://{0.netloc}".format(urlsplit(url))
    if isinstance(error, (httpx.ConnectError, httpx.ConnectTimeout)):
        return RemoteError(f"{where} cannot be reached ({error}); is a server running there? `dso serve MODEL` starts one")
    if isinstance(error, httpx.TimeoutException):
        return RemoteError(f"{where} has not answered for {_READ:.0f} s; try again, or look at its log")
    return RemoteError(f"the connection to {where} broke: {error}")


def _refused(response: Any, url: str) -> RemoteError:
    """A status that is not 200, in plain words."""
    body = b""
    for chunk in response.iter_bytes():
        body += chunk
        if len(body) > _MAX_ERROR:
            break
    try:
        said = _message(json.loads(body))
    except ValueError:
        said = ""
    status, detail = response.status_code, f": {said}" if said else ""
    if status in (401, 403):
        return RemoteError(f"the server refuses the key{detail}; give another with --api-key or OPENAI_API_KEY")
    if status == 404:
        return RemoteError(f"the server knows no such model or path{detail or f': {url}'}; look at --model and --url")
    if status in (429, 503):
        after = response.headers.get("retry-after", "")
        return RemoteError(f"the server is busy{detail}; try again {f'in {after} s' if after.isdigit() else 'later'}")
    if 300 <= status < 400:
        return RemoteError(f"the server points elsewhere ({status}): name that in --url")
    return RemoteError(f"the server {'failed' if status >= 500 else 'refuses the request'} ({status}){detail}")


def _message(body: Any) -> str:
    """What an error's body says, as OpenAI, FastAPI and others put it."""
    found = body.get("error", body.get("detail", body.get("message"))) if isinstance(body, dict) else None
    found = found.get("message") if isinstance(found, dict) else found
    return "".join(c for c in " ".join(found.split())[:500] if c.isprintable()) if isinstance(found, str) else ""
