"""Uploads: multipart forms with one file and a few short fields, read into memory with limits on size and time."""

from __future__ import annotations

import asyncio
import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass, field

from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.requests import ClientDisconnect, Request

from ..http.problems import ApiError
from ..settings import ServerSettings
from .file_store import Room

MAX_NAME = 255  # characters
_MAX_PARTS, _MAX_FIELD, _MAX_HEAD = 8, 256, 8192  # parts of a form; bytes of a field, and of a part's headers
_ENVELOPE = _MAX_PARTS * (_MAX_FIELD + _MAX_HEAD + 1024)  # maximum bytes of a form besides its file
_CLOSE = {"Connection": "close"}
_NO_NAME = re.compile(r"[\x00-\x1f\x7f\u0080-\u009f\u2028\u2029\ud800-\udfff]")


@dataclass
class Upload:
    """The content of a form.

    Attributes:
        name: the file's name; None: there was no file.
        data: the file's bytes.
        fields: the other fields.
    """

    name: str | None = None
    data: bytearray = field(default_factory=bytearray)
    fields: dict[str, str] = field(default_factory=dict)


async def read_upload_form(request: Request, settings: ServerSettings, room: Room) -> Upload:
    """Reads the form in a request's body. Its memory is counted in `room` while it is received.

    Raises:
        ApiError: 400, the form is malformed; 408, it was received too slowly; 413, it is too large; 415, another Content-Type;
            503, there is not enough memory.
        ClientDisconnect: the client has disconnected.
    """
    form = _Form(_boundary(request), settings)
    length = request.headers.get("content-length", "0")
    if length.isdecimal() and int(length[:20]) > settings.max_file_bytes + _ENVELOPE:
        raise too_large(settings)
    try:
        await asyncio.wait_for(_receive(request, form, room), settings.upload_seconds)
    except asyncio.TimeoutError:
        raise ApiError(408, "the file was received too slowly", code="timeout", headers=_CLOSE) from None
    return form.upload


def check_origin(request: Request, allowed: Iterable[str]) -> None:
    """Refuses forms from pages of other origins. Browsers send forms for any page without a CORS preflight, unlike JSON.

    Args:
        request: the request.
        allowed: origins that may send forms, or "*".

    Raises:
        ApiError: 403, the request was sent by a page of another origin.
    """
    origin = request.headers.get("origin")
    if origin is None or request.headers.get("sec-fetch-site") == "same-origin":
        return
    own = origin.partition("://")[2].lower() == request.headers.get("host", "").strip().lower()
    if not own and origin not in allowed and "*" not in allowed:
        raise ApiError(
            403, "pages of other origins may not send files; --allow-origin ORIGIN allows it", code="origin", headers=_CLOSE
        )


async def _receive(request: Request, form: _Form, room: Room) -> None:
    while True:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        form.feed(message.get("body", b""))
        room.set(len(form.upload.data))
        if not message.get("more_body", False):
            return form.close()


def too_large(settings: ServerSettings) -> ApiError:
    """The error for a file that is too large: 413."""
    return ApiError(
        413, f"file: is larger than the maximum of {settings.max_file_bytes / 1e6:,.4g} MB", param="file",
        code="file_too_large", headers=_CLOSE,
    )  # fmt: skip


def label(name: str) -> str:
    """A file's name without folders, for display and for its extension.

    Raises:
        ApiError: 400, it is too long or contains control characters.
    """
    name = re.split(r"[/\\]", name)[-1].strip()
    if len(name) > MAX_NAME:
        raise ApiError(400, f"file: its name has {len(name)} characters, but may have at most {MAX_NAME}", param="filename")
    if _NO_NAME.search(name):
        raise ApiError(400, "file: its name contains control characters", param="filename")
    return name if name.strip(". ") else "file"


def digest_of(name: str, data: bytes | bytearray) -> str:
    """A digest of a file's name and content."""
    digest = hashlib.blake2b(name.encode() + b"\0", digest_size=20)
    digest.update(data)
    return digest.hexdigest()


def _boundary(request: Request) -> bytes:
    kind, options = parse_options_header(request.headers.get("content-type", "")[:1024])
    if kind != b"multipart/form-data":
        raise ApiError(415, "a file must be sent as a form: Content-Type: multipart/form-data", headers=_CLOSE)
    if request.headers.get("content-encoding", "identity").strip().lower() != "identity":
        raise ApiError(415, "the body must not be compressed", headers=_CLOSE)
    boundary = options.get(b"boundary", b"")
    if not 1 <= len(boundary) <= 200:
        raise ApiError(400, "the Content-Type has no boundary", code="invalid_form", headers=_CLOSE)
    return boundary


class _Form:
    """Parses a form incrementally."""

    def __init__(self, boundary: bytes, settings: ServerSettings) -> None:
        self.upload = Upload()
        self._settings = settings
        self._parts, self._head, self._ended = 0, 0, False
        self._header, self._value = bytearray(), bytearray()
        self._headers: dict[bytes, bytes] = {}
        self._into, self._max = bytearray(), 0
        self._name: str | None = None  # of the current field; None: it is the file
        self._parser = MultipartParser(
            boundary,
            {
                "on_part_begin": self._part_begins,
                "on_header_field": self._in_header,
                "on_header_value": self._in_value,
                "on_header_end": self._header_ends,
                "on_headers_finished": self._headers_end,
                "on_part_data": self._in_part,
                "on_part_end": self._part_ends,
                "on_end": self._ends,
            },
        )

    def feed(self, data: bytes) -> None:
        try:
            self._parser.write(data)
        except ValueError:  # python-multipart's errors are ValueErrors
            raise _malformed("it is not a multipart form") from None

    def close(self) -> None:
        if not self._ended:
            raise _malformed("it ends early")

    def _part_begins(self) -> None:
        self._parts += 1
        if self._parts > _MAX_PARTS:
            raise _malformed(f"it has more than {_MAX_PARTS} parts")
        self._head, self._headers = 0, {}

    def _in_header(self, data: bytes, start: int, end: int) -> None:
        self._count_head(end - start)
        self._header += data[start:end]

    def _in_value(self, data: bytes, start: int, end: int) -> None:
        self._count_head(end - start)
        self._value += data[start:end]

    def _count_head(self, size: int) -> None:
        self._head += size
        if self._head > _MAX_HEAD:
            raise _malformed(f"a part has more than {_MAX_HEAD} bytes of headers")

    def _header_ends(self) -> None:
        self._headers[bytes(self._header).lower()] = bytes(self._value)
        self._header, self._value = bytearray(), bytearray()

    def _headers_end(self) -> None:
        kind, options = parse_options_header(self._headers.get(b"content-disposition", b""))
        name = options.get(b"name", b"").decode("utf-8", "replace")
        if kind != b"form-data" or not name:
            raise _malformed("a part has no name")
        if name == "file":
            if self.upload.name is not None:
                raise ApiError(400, "file: only one file per request is allowed", param="file")
            given = options.get(b"filename", b"file").decode("utf-8", "replace")
            self.upload.name = label(given.replace("%22", '"'))  # as browsers write it
            self._name, self._into, self._max = None, self.upload.data, self._settings.max_file_bytes
        else:
            self._name, self._into, self._max = name[:64], bytearray(), _MAX_FIELD

    def _in_part(self, data: bytes, start: int, end: int) -> None:
        if len(self._into) + end - start > self._max:
            if self._name is None:
                raise too_large(self._settings)
            raise ApiError(400, f"{self._name}: is longer than {_MAX_FIELD} bytes", param=self._name)
        self._into += data[start:end]

    def _part_ends(self) -> None:
        if self._name is not None:
            self.upload.fields[self._name] = self._into.decode("utf-8", "replace")

    def _ends(self) -> None:
        self._ended = True


def _malformed(what: str) -> ApiError:
    return ApiError(400, f"the form cannot be read: {what}", code="invalid_form", headers=_CLOSE)
