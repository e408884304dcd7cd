"""Request bodies: read within bounds of size and time, then parsed as strict JSON."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import orjson
from starlette.requests import ClientDisconnect, Request

from .problems import ApiError, busy
from .settings import ServerSettings

_CLOSE = {"Connection": "close"}


class BodyReader:
    """Reads bodies, and counts what those that are being read take, of each client and of all together."""

    def __init__(self, settings: ServerSettings) -> None:
        self._settings = settings
        self._held = Counter[str]()  # bytes of bodies that are not parsed yet, by client

    async def read(self, request: Request) -> tuple[dict[str, Any], int]:
        """The object that a request's body is, and the bytes that it came in.

        Raises:
            ApiError: 400 not strict JSON (NaN, lone surrogates), not an object, or nested too deeply; 408 too slow; 413 too
                large; 415 not JSON by its headers; 503 too many bodies at once.
            ClientDisconnect: the client left.
        """
        self._check_headers(request)
        with self._counted(request.state.client) as count:
            try:
                body = await asyncio.wait_for(self._bytes(request, count), self._settings.body_seconds)
            except asyncio.TimeoutError:
                raise ApiError(408, "the body came too slowly", code="timeout", headers=_CLOSE) from None
            try:
                value = orjson.loads(body)
            except orjson.JSONDecodeError as error:
                raise ApiError(400, f"the body is not valid JSON: {error}", code="invalid_json") from None
        if not isinstance(value, dict):
            raise ApiError(400, "the body must be a JSON object", code="invalid_json")
        if _deeper(value, self._settings.most_json_depth):
            raise ApiError(
                400, f"the body nests lists and objects more than {self._settings.most_json_depth} deep", code="invalid_json"
            )
        return value, len(body)

    def _check_headers(self, request: Request) -> None:
        kind, _, parameters = request.headers.get("content-type", "").partition(";")
        charset = parameters.lower().replace('"', "").replace(" ", "")
        if kind.strip().lower() != "application/json" or charset not in ("", "charset=utf-8"):
            raise ApiError(415, "the body must be JSON in UTF-8: send Content-Type: application/json")
        if request.headers.get("content-encoding", "identity").strip().lower() != "identity":
            raise ApiError(415, "the body must not be compressed")
        length = request.headers.get("content-length", "0")
        if length.isdecimal() and int(length[:20]) > self._settings.most_body_bytes:
            raise self._too_large()

    async def _bytes(self, request: Request, count: _Count) -> bytearray:
        body = bytearray()
        while True:
            message = await request.receive()
            if message["type"] == "http.disconnect":
                raise ClientDisconnect
            body += message.get("body", b"")
            if len(body) > self._settings.most_body_bytes:
                raise self._too_large()
            count.set(len(body))
            if not message.get("more_body", False):
                return body

    def _too_large(self) -> ApiError:
        return ApiError(413, f"the body is larger than {self._settings.most_body_bytes} bytes", headers=_CLOSE)

    @contextmanager
    def _counted(self, client: str) -> Iterator[_Count]:
        count = _Count(self, client)
        try:
            yield count
        finally:
            count.set(0)

    def hold(self, client: str, change: int) -> None:
        if change > 0:
            if self._held[client] + change > self._settings.most_key_bodies_bytes:
                raise busy("the server is reading as many bodies of yours as it can hold")
            if self._held.total() + change > self._settings.most_bodies_bytes:
                raise busy("the server is reading as many bodies as it can hold")
        self._held[client] += change
        if not self._held[client]:
            del self._held[client]


class _Count:
    """One body's part in what is held."""

    def __init__(self, reader: BodyReader, client: str) -> None:
        self._reader, self._client, self._bytes = reader, client, 0

    def set(self, size: int) -> None:
        self._reader.hold(self._client, size - self._bytes)
        self._bytes = size


def _deeper(value: Any, most: int) -> bool:
    """Whether lists and objects nest deeper. Level by level, so that no depth can exhaust the stack."""
    level = [value]
    for _ in range(most):
        below: list[Any] = []
        for item in level:
            children = item.values() if type(item) is dict else item
            below += [child for child in children if type(child) is dict or type(child) is list]
        if not below:
            return False
        level = below
    return True
