"""One request to a server over a connection of its own, with the time at which each piece of the answer came.

Light on purpose, since whoever loads a server often shares its cores: while the answer comes, bytes and times are put aside;
they are made sense of when it is whole.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

_DONE = b"data: [DONE]"
_BLANK = b"\r\n\r\n"


@dataclass(frozen=True)
class HttpReply:
    """What came back.

    Attributes:
        status: of HTTP; 0 where nothing came.
        headers: names in lower case.
        body: without the transfer's framing.
        sent: `time.perf_counter` when the request was.
        marks: (bytes of the body that had come, when), for each piece.
        whole: whether the body came to its end.
    """

    status: int = 0
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes = b""
    sent: float = 0.0
    marks: tuple[tuple[int, float], ...] = ()
    whole: bool = False

    def json(self) -> Any:
        """Of an answer that is no stream."""
        return json.loads(self.body)

    @cached_property
    def events(self) -> list[tuple[float, dict[str, Any]]]:
        """(when its last byte came, what it says) of each server-sent event that did; `[DONE]` is none."""
        found, at, mark = [], 0, 0
        while (end := self.body.find(b"\n\n", at)) >= 0:
            line, at = self.body[at:end], end + 2
            while self.marks[mark][0] < at:
                mark += 1
            if line.startswith(b"data: {"):
                found.append((self.marks[mark][1], json.loads(line[6:])))
        return found

    @property
    def streamed(self) -> bool:
        """Whether it is server-sent events."""
        return self.headers.get("content-type", "").startswith("text/event-stream")

    @property
    def done(self) -> bool:
        """Whether a stream came to its end as it should."""
        return self.whole and self.body.rstrip().endswith(_DONE)

    @property
    def pieces(self) -> list[tuple[float, str]]:
        """(when, text) of each event of the first answer that brought text."""
        return [(when, text) for when, event in self.events for choice in event.get("choices", ()) if (text := _text(choice))]

    @property
    def text(self) -> str:
        """Of the first answer, streamed or not."""
        if self.streamed:
            return "".join(text for _, text in self.pieces)
        return _text(self.json()["choices"][0])

    @property
    def usage(self) -> dict[str, Any] | None:
        """Tokens, where the server said."""
        bodies = [event for _, event in self.events] if self.streamed else [self.json()]
        return next((body["usage"] for body in reversed(bodies) if body.get("usage")), None)

    @property
    def retry_after(self) -> float:
        """Seconds that the server asks to wait."""
        return float(self.headers.get("retry-after", 1))


def _text(choice: Mapping[str, Any]) -> str:
    if choice.get("index", 0):
        return ""
    holder = choice.get("delta") or choice.get("message") or {"content": choice.get("text")}
    return holder.get("content") or ""


class Exchange(asyncio.Protocol):
    """A request on its way. Made by `send`."""

    def __init__(self, request: bytes) -> None:
        self._request = request
        self._pieces: list[tuple[float, bytes]] = []
        self._over = asyncio.get_running_loop().create_future()
        self._begun = asyncio.Event()
        self.sent = 0.0

    def connection_made(self, transport: Any) -> None:
        self._transport = transport
        self.sent = time.perf_counter()
        transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        self._pieces.append((time.perf_counter(), data))
        self._begun.set()

    def connection_lost(self, exc: Exception | None) -> None:
        self._begun.set()
        if not self._over.done():
            self._over.set_result(None)

    @property
    def received(self) -> int:
        """Pieces that came so far."""
        return len(self._pieces)

    @property
    def over(self) -> bool:
        """Whether the connection is gone."""
        return self._over.done()

    async def begun(self) -> None:
        """Until something has come, or the connection is gone."""
        await self._begun.wait()

    def leave(self) -> None:
        """Cuts the connection, as a client that has gone."""
        self._transport.abort()

    async def reply(self) -> HttpReply:
        """When the server has closed the connection."""
        await self._over
        return reply_of(self._pieces, self.sent)


async def send(port: int, path: str, body: Mapping[str, Any] | None = None, *, key: str | None = None) -> Exchange:
    """Opens a connection to this machine and sends a request: POST of JSON, or GET where there is none.

    Raises: OSError, nobody listens.
    """
    request = request_bytes(path, body, key=key)
    _, exchange = await asyncio.get_running_loop().create_connection(lambda: Exchange(request), "127.0.0.1", port)
    return exchange


async def ask(port: int, path: str, body: Mapping[str, Any] | None = None, *, key: str | None = None) -> HttpReply:
    """`send`, and the whole answer.

    Raises: OSError, nobody listens.
    """
    return await (await send(port, path, body, key=key)).reply()


def request_bytes(path: str, body: Mapping[str, Any] | None = None, *, key: str | None = None) -> bytes:
    """HTTP/1.1, after which the server closes the connection."""
    lines = [f"{'GET' if body is None else 'POST'} {path} HTTP/1.1", "Host: 127.0.0.1", "Connection: close"]
    content = b""
    if body is not None:
        content = json.dumps(body).encode()
        lines += ["Content-Type: application/json", f"Content-Length: {len(content)}"]
    if key is not None:
        lines.append(f"Authorization: Bearer {key}")
    return "\r\n".join(lines).encode() + _BLANK + content


def reply_of(pieces: list[tuple[float, bytes]], sent: float = 0.0) -> HttpReply:
    """Of a connection's (time, bytes) from its beginning to its end."""
    data = b"".join(piece for _, piece in pieces)
    head, blank, rest = data.partition(_BLANK)
    if not blank:
        return HttpReply(sent=sent)
    first, *lines = head.decode("latin-1").split("\r\n")
    headers = {name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    arrivals, total = [], 0
    for when, piece in pieces:
        total += len(piece)
        arrivals.append((total - len(head) - len(_BLANK), when))
    if headers.get("transfer-encoding") == "chunked":
        body, marks, whole = _unchunked(rest, arrivals)
    else:
        body, marks = rest, tuple((min(max(at, 0), len(rest)), when) for at, when in arrivals)
        whole = len(rest) == int(headers.get("content-length", -1))
    return HttpReply(int(first.split(" ", 2)[1]), headers, body, sent, marks, whole)


def _unchunked(data: bytes, arrivals: list[tuple[int, float]]) -> tuple[bytes, tuple[tuple[int, float], ...], bool]:
    """The body, its marks, and whether its last chunk came. A chunk counts when all of it is there."""
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
