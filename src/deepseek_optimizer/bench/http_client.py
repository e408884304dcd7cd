"""One HTTP request on a connection of its own, with the arrival time of each part of the response.

Lightweight on purpose, since a load generator often shares the server's cores: during the response only bytes and times are
recorded; they are parsed afterwards.
"""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any
from urllib.parse import urlsplit

_DONE = b"data: [DONE]"
_BLANK = b"\r\n\r\n"
_BLANK_LINE = re.compile(rb"\r?\n\r?\n")  # at the end of an event


@dataclass(frozen=True)
class Address:
    """Where a server listens, and the path that its API begins with.

    Attributes:
        tls: whether the connection is encrypted; the server's certificate is then verified.
        path: "" or, for example, "/v1".
    """

    host: str
    port: int
    tls: bool = False
    path: str = ""

    @classmethod
    def of(cls, url: str) -> Address:
        """The address in an http or https URL.

        Raises:
            ValueError: the port is not a number.
        """
        parts = urlsplit(url)
        tls = parts.scheme == "https"
        return cls(parts.hostname or "", parts.port or (443 if tls else 80), tls, parts.path.rstrip("/"))


@dataclass(frozen=True)
class HttpReply:
    """A response.

    Attributes:
        status: HTTP status; 0 if there was no response.
        headers: names in lower case.
        body: without transfer encoding.
        sent: `time.perf_counter` when the request was sent.
        marks: (bytes of the body received so far, time), for each part.
        whole: whether the body is complete.
    """

    status: int = 0
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes = b""
    sent: float = 0.0
    marks: tuple[tuple[int, float], ...] = ()
    whole: bool = False

    def json(self) -> Any:
        """The body of a response that is not streamed."""
        return json.loads(self.body)

    @cached_property
    def events(self) -> list[tuple[float, dict[str, Any]]]:
        """(arrival time of its last byte, data) of each complete server-sent event except `[DONE]`."""
        events, at, mark = [], 0, 0
        for blank in _BLANK_LINE.finditer(self.body):
            lines, at = self.body[at : blank.start()].splitlines(), blank.end()
            while self.marks[mark][0] < at:
                mark += 1
            data = next((line[5:].strip() for line in lines if line.startswith(b"data:")), b"")
            if data.startswith(b"{"):
                events.append((self.marks[mark][1], json.loads(data)))
        return events

    @property
    def streamed(self) -> bool:
        """Whether the response consists of server-sent events."""
        return self.headers.get("content-type", "").startswith("text/event-stream")

    @property
    def done(self) -> bool:
        """Whether a stream ended properly."""
        return self.whole and self.body.rstrip().endswith(_DONE)

    @property
    def chunks(self) -> list[tuple[float, str]]:
        """(arrival time, text) of each event of the first choice that has text."""
        return [(when, text) for when, event in self.events for choice in event.get("choices", ()) if (text := _text(choice))]

    @property
    def pieces(self) -> list[float]:
        """Arrival time of each event that has something generated: text, reasoning or a call of a tool."""
        return [when for when, event in self.events if any(map(_generated, event.get("choices") or ()))]

    @property
    def text(self) -> str:
        """The text of the first choice, streamed or not."""
        if self.streamed:
            return "".join(text for _, text in self.chunks)
        return _text(self.json()["choices"][0])

    @property
    def usage(self) -> dict[str, Any] | None:
        """Token counts, if the server reported them."""
        bodies = [event for _, event in self.events] if self.streamed else [self.json()]
        return next((body["usage"] for body in reversed(bodies) if body.get("usage")), None)

    @property
    def retry_after(self) -> float:
        """Seconds to wait according to the server."""
        return float(self.headers.get("retry-after", 1))


def _text(choice: Mapping[str, Any]) -> str:
    if choice.get("index", 0):
        return ""
    holder = choice.get("delta") or choice.get("message") or {"content": choice.get("text")}
    return holder.get("content") or ""


def _generated(choice: Mapping[str, Any]) -> bool:
    """Whether a choice of an event has anything that was generated: text, reasoning or a call of a tool."""
    delta = choice.get("delta") or {}
    return bool(choice.get("text")) or any(
        delta.get(name) for name in ("content", "reasoning_content", "reasoning", "tool_calls")
    )


class Exchange(asyncio.Protocol):
    """A request in progress, created by `send`."""

    def __init__(self, request: bytes) -> None:
        self._request = request
        self._chunks: list[tuple[float, bytes]] = []
        self._over = asyncio.get_running_loop().create_future()
        self._begun = asyncio.Event()
        self.sent = 0.0

    def connection_made(self, transport: Any) -> None:
        self._transport = transport
        self.sent = time.perf_counter()
        transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        self._chunks.append((time.perf_counter(), data))
        self._begun.set()

    def connection_lost(self, exc: Exception | None) -> None:
        self._begun.set()
        if not self._over.done():
            self._over.set_result(None)

    @property
    def received(self) -> int:
        """Number of parts received so far."""
        return len(self._chunks)

    @property
    def over(self) -> bool:
        """Whether the connection is closed."""
        return self._over.done()

    async def begun(self) -> None:
        """Waits until something is received, or the connection is closed."""
        await self._begun.wait()

    def leave(self) -> None:
        """Aborts the connection, like a client that disappears."""
        self._transport.abort()

    async def reply(self) -> HttpReply:
        """Waits until the server closes the connection, and returns the response."""
        await self._over
        return reply_of(self._chunks, self.sent)


async def send(to: int | Address, path: str, body: Mapping[str, Any] | None = None, *, key: str | None = None) -> Exchange:
    """Opens a connection and sends a request: POST with a JSON body, or GET without one.

    Args:
        to: the server; a number is a port of this machine.
        path: after the path of the address.

    Raises:
        OSError: nothing listens there, or the certificate is not valid.
    """
    address = Address("127.0.0.1", to) if isinstance(to, int) else to
    request = request_bytes(address.path + path, body, key=key, host=address.host)
    _, exchange = await asyncio.get_running_loop().create_connection(
        lambda: Exchange(request), address.host, address.port, ssl=address.tls or None
    )
    return exchange


async def ask(to: int | Address, path: str, body: Mapping[str, Any] | None = None, *, key: str | None = None) -> HttpReply:
    """Like `send`, but waits for the complete response.

    Raises:
        OSError: as `send`.
    """
    return await (await send(to, path, body, key=key)).reply()


def request_bytes(
    path: str, body: Mapping[str, Any] | None = None, *, key: str | None = None, host: str = "127.0.0.1"
) -> bytes:
    """An HTTP/1.1 request after which the server closes the connection."""
    name = f"[{host}]" if ":" in host else host
    lines = [f"{'GET' if body is None else 'POST'} {path} HTTP/1.1", f"Host: {name}", "Connection: close"]
    content = b""
    if body is not None:
        content = json.dumps(body).encode()
        lines += ["Content-Type: application/json", f"Content-Length: {len(content)}"]
    if key is not None:
        lines.append(f"Authorization: Bearer {key}")
    return "\r\n".join(lines).encode() + _BLANK + content


def reply_of(chunks: list[tuple[float, bytes]], sent: float = 0.0) -> HttpReply:
    """The response from all (time, bytes) of a connection."""
    data = b"".join(chunk for _, chunk in chunks)
    head, blank, rest = data.partition(_BLANK)
    if not blank:
        return HttpReply(sent=sent)
    first, *lines = head.decode("latin-1").split("\r\n")
    headers = {name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    arrivals, total = [], 0
    for when, chunk in chunks:
        total += len(chunk)
        arrivals.append((total - len(head) - len(_BLANK), when))
    if headers.get("transfer-encoding") == "chunked":
        body, marks, whole = _unchunked(rest, arrivals)
    else:
        body, marks = rest, tuple((min(max(at, 0), len(rest)), when) for at, when in arrivals)
        whole = len(rest) == int(headers.get("content-length", -1))
    return HttpReply(int(first.split(" ", 2)[1]), headers, body, sent, marks, whole)


def _unchunked(data: bytes, arrivals: list[tuple[int, float]]) -> tuple[bytes, tuple[tuple[int, float], ...], bool]:
    """The body, its marks, and whether the last chunk was received. A chunk counts when it is complete."""
    body: list[bytes] = []
    marks: list[tuple[int, float]] = []
    at = place = size = 0
    while (line := data.find(b"\r\n", at)) >= 0:
        length = int(data[at:line], 16)
        end = line + 2 + length + 2
        if length == 0:
            return b"".join(body), tuple(marks), len(data) >= end
        if len(data) < end:
            break
        body.append(data[line + 2 : end - 2])
        size += length
        while arrivals[place][0] < end:
            place += 1
        marks.append((size, arrivals[place][1]))
        at = end
    return b"".join(body), tuple(marks), False
