"""Request bodies: read with limits on size and time, then parsed as strict JSON."""

from __future__ import annotations

import asyncio
import gc
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import orjson
from starlette.requests import ClientDisconnect, Request

from ..settings import ServerSettings
from .fair_queue import FairQueue
from .paths import path_of
from .problems import ApiError, busy

T = TypeVar("T")

_CLOSE = {"Connection": "close"}
TEXT_BODY, PICTURE_BODY = 4 << 20, 48 << 20  # default limits of a body: 32 MiB of pictures are 43 MiB in base64
_MAX_MARKS = 2 << 20  # beginnings of lists and objects, and commas: as many as a body of text can have
_SMALL = 1 << 16  # bytes of a body that takes about a millisecond of work
_SHARE = 0.2  # fraction of the time for parsing a client's large bodies, during which nothing else of the server runs
_MAX_PARTS = 50_000  # lists and objects in a body: 10,000 messages have three each
_HOLDERS = frozenset({dict, list})
_MAX_FIELDS = 5_000  # in an object: more than the properties of any accepted schema


class BodyReader:
    """Reads bodies, and limits the memory of those that are being read, for each client and in total.

    Args:
        settings: the server's.
        max_per_client, max_jobs: see `FairQueue`.

    Attributes:
        max_bytes: maximum size of a body: of the settings, or else TEXT_BODY, and PICTURE_BODY after `accept_pictures`.
    """

    def __init__(self, settings: ServerSettings, max_per_client: int, max_jobs: int) -> None:
        self._settings = settings
        self.max_bytes = settings.max_body_bytes or TEXT_BODY
        self.queue = FairQueue("large bodies", 1, max_running=1, max_per_client=max_per_client, max_jobs=max_jobs, share=_SHARE)
        self._held = Counter[str]()  # bytes of bodies that are not parsed yet, by client

    def accept_pictures(self) -> None:
        """Raises the limit of a body, unless the settings have one, since a model accepts pictures, or may."""
        self.max_bytes = self._settings.max_body_bytes or PICTURE_BODY

    async def read(self, request: Request) -> tuple[dict[str, Any], int]:
        """Reads a request's body. Returns the JSON object, and the number of bytes.

        Raises:
            ApiError: 400 not strict JSON (NaN, lone surrogates), not an object, nested too deeply or with too many parts;
                408 too slow; 413 too large; 415 another Content-Type; 503 too many bodies at once; others see `FairQueue.run`.
            ClientDisconnect: the client has disconnected.
        """
        known: tuple[dict[str, Any], int] | None = getattr(request.state, "body", None)
        if known is not None:  # read before, to choose the model
            return known
        client = request.state.client
        self._check_headers(request)
        with self._counted(client) as count:
            try:
                body = await asyncio.wait_for(self._bytes(request, count), self._settings.body_seconds)
            except asyncio.TimeoutError:
                raise ApiError(408, "the body was received too slowly", code="timeout", headers=_CLOSE) from None
            return await self.working(client, len(body), lambda: self._parsed(body)), len(body)

    @contextmanager
    def holding(self, client: str, size: int) -> Iterator[None]:
        """Counts a body that was read and waits to be processed; raises ApiError 503 if there are too many."""
        with self._counted(client) as count:
            count.set(size)
            yield

    async def working(self, client: str, size: int, work: Callable[[], T]) -> T:
        """Processes a body's JSON: at once if it is small, and on the queue's thread if it is large, so that the event loop and
        other clients' bodies are not delayed.

        Args:
            client: key of the client.
            size: bytes of the body.
            work: the function to run.

        Raises:
            ApiError: see `FairQueue.run`.
        """
        if size <= _SMALL:
            return work()
        return await self.queue.run(client, work, time.monotonic() + self._settings.request_seconds)

    def _parsed(self, body: bytearray) -> dict[str, Any]:
        if len(body) > TEXT_BODY and sum(map(body.count, b"[{,")) > _MAX_MARKS:  # parsed, each would take up to 64 bytes
            raise ApiError(400, "a body of this size may contain pictures, but not as many values", code="invalid_json")
        try:
            with _no_collection():
                value = orjson.loads(body)
        except orjson.JSONDecodeError as error:
            raise ApiError(400, f"the body is not valid JSON: {error}", code="invalid_json") from None
        if not isinstance(value, dict):
            raise ApiError(400, "the body must be a JSON object", code="invalid_json")
        _check_shape(value, self._settings.max_json_depth)
        return value

    def _check_headers(self, request: Request) -> None:
        kind, _, parameters = request.headers.get("content-type", "").partition(";")
        charset = parameters.lower().replace('"', "").replace(" ", "")
        if not self._is_json(kind.strip().lower(), request) or charset not in ("", "charset=utf-8"):
            raise ApiError(415, "the body must be JSON in UTF-8: send Content-Type: application/json")
        if request.headers.get("content-encoding", "identity").strip().lower() != "identity":
            raise ApiError(415, "the body must not be compressed")
        length = request.headers.get("content-length", "0")
        if length.isdecimal() and int(length[:20]) > self.max_bytes:
            raise self._too_large()

    @staticmethod
    def _is_json(kind: str, request: Request) -> bool:
        """Whether the Content-Type is accepted. Ollama's examples with curl do not send that of JSON. Browsers, whose requests
        have an Origin, must: pages of other origins cannot."""
        return kind == "application/json" or (path_of(request.scope).startswith("/api/") and "origin" not in request.headers)

    async def _bytes(self, request: Request, count: _Count) -> bytearray:
        body = bytearray()
        while True:
            message = await request.receive()
            if message["type"] == "http.disconnect":
                raise ClientDisconnect
            body += message.get("body", b"")
            if len(body) > self.max_bytes:
                raise self._too_large()
            count.set(len(body))
            if not message.get("more_body", False):
                return body

    def _too_large(self) -> ApiError:
        return ApiError(413, f"the body is larger than {self.max_bytes} bytes", headers=_CLOSE)

    @contextmanager
    def _counted(self, client: str) -> Iterator[_Count]:
        count = _Count(self, client)
        try:
            yield count
        finally:
            count.set(0)

    def hold(self, client: str, change: int) -> None:
        """Adds `change` bytes to a client's memory; ApiError 503 if that exceeds a limit."""
        if change > 0:
            if self._held[client] + change > self._settings.max_body_bytes_per_client:
                raise busy("too many of your requests are being received")
            if self._held.total() + change > self._settings.max_body_bytes_total:
                raise busy("too many requests are being received")
        self._held[client] += change
        if not self._held[client]:
            del self._held[client]


class _Count:
    """The memory of one body."""

    def __init__(self, reader: BodyReader, client: str) -> None:
        self._reader, self._client, self._bytes = reader, client, 0

    def set(self, size: int) -> None:
        self._reader.hold(self._client, size - self._bytes)
        self._bytes = size


def _check_shape(value: dict[str, Any], max_depth: int) -> None:
    """Checks the nesting depth and size of a body, before its contents are examined. It works level by level, so that no depth
    can exhaust the stack.

    Raises:
        ApiError: 400, lists and objects are nested too deeply, are too many, or an object has too many fields.
    """
    level: list[Any] = [value]
    parts = 0
    for _ in range(max_depth):
        below: list[Any] = []
        for item in level:
            children = item.values() if type(item) is dict else item
            if type(item) is dict and len(item) > _MAX_FIELDS:
                raise ApiError(400, f"an object in the body has more than {_MAX_FIELDS:,} fields", code="invalid_json")
            if _HOLDERS.isdisjoint(map(type, children)):
                continue
            below += [child for child in children if type(child) is dict or type(child) is list]
            if parts + len(below) > _MAX_PARTS:
                raise ApiError(400, f"the body has more than {_MAX_PARTS:,} lists and objects", code="invalid_json")
        if not below:
            return
        parts += len(below)
        level = below
    raise ApiError(400, f"lists and objects in the body are nested more than {max_depth} deep", code="invalid_json")


@contextmanager
def _no_collection() -> Iterator[None]:
    """Disables the garbage collector, which would visit a million new objects repeatedly although none of them is garbage."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
