"""The input of a batch job: a file with one request per line, in the format of OpenAI's Batch API."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import DataError, excerpt, shown

RESPONSES = "/v1/responses"
GENERATING = ("/v1/chat/completions", "/v1/completions", RESPONSES)  # these sample, so that they have a seed
ENDPOINTS = (*GENERATING, "/v1/embeddings")
_MAX_NAME = 512  # characters
_FIELDS = frozenset({"custom_id", "method", "url", "body"})
_OF_STORED_RESPONSES = {
    "store": "responses of a batch are in its output and are not stored; set it to false, or leave it out",
    "background": "a batch waits for its responses; leave it out",
    "previous_response_id": "a batch must not depend on what is stored; send the whole conversation in input",
}


@dataclass(frozen=True)
class BatchRequest:
    """A line of the input.

    Attributes:
        index: its place among the requests, from 0.
        custom_id: the user's name for it, unique in the file.
        url: the path of the endpoint.
        body: the endpoint's request.
    """

    index: int
    custom_id: str
    url: str
    body: dict[str, Any]


@dataclass(frozen=True)
class BatchInput:
    """The requests of a job.

    Attributes:
        requests: in the order of the file.
        digest: SHA-256 of the file, in hexadecimal digits.
        written: time of its last modification, in seconds of the Unix clock.
    """

    requests: tuple[BatchRequest, ...]
    digest: str
    written: int


def read_requests(path: Path, max_line: int | None = None) -> BatchInput:
    """Reads and checks a file of requests. Empty lines are skipped.

    Args:
        path: the file.
        max_line: maximum bytes of a line; None: any number.

    Raises:
        DataError: a line is not a valid request, or there is none; it names line and field.
        OSError: the file cannot be read.
    """
    data = path.read_bytes()
    requests: list[BatchRequest] = []
    lines: dict[str, int] = {}  # of each custom_id
    for number, line in enumerate(data.split(b"\n"), 1):
        if not line.strip():
            continue
        if max_line is not None and len(line) > max_line:
            raise DataError(f"the line has {len(line):,} bytes, but may have at most {max_line:,}", file=path, line=number)
        request = _request(line, len(requests), path, number)
        if (first := lines.setdefault(request.custom_id, number)) != number:
            message = f"{excerpt(request.custom_id)!r} is the name of line {first:,} too; give each request its own"
            raise DataError(message, file=path, line=number, field="custom_id")
        requests.append(request)
    if not requests:
        raise DataError("there are no requests; write one JSON object per line", file=path)
    return BatchInput(tuple(requests), hashlib.sha256(data).hexdigest(), int(path.stat().st_mtime))


def _request(line: bytes, index: int, path: Path, number: int) -> BatchRequest:
    def error(message: str, field: str | None = None) -> DataError:
        return DataError(message, file=path, line=number, field=field)

    try:
        value = json.loads(line)
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()  # NaN and halves of surrogate pairs cannot be sent
    except (ValueError, RecursionError) as cause:
        raise error(f"not valid JSON ({cause})") from None
    if not isinstance(value, dict):
        raise error("must be a JSON object with custom_id, method, url and body")
    if unknown := sorted(value.keys() - _FIELDS):
        raise error(f"the field is not known; the fields are {', '.join(sorted(_FIELDS))}", excerpt(unknown[0]))
    custom_id, url, body = value.get("custom_id"), value.get("url"), value.get("body")
    if not isinstance(custom_id, str) or not 1 <= len(custom_id) <= _MAX_NAME:
        raise error(f"must be a text of 1 to {_MAX_NAME} characters, got {shown(custom_id)}", "custom_id")
    if value.get("method", "POST") != "POST":
        raise error(f"must be POST, got {shown(value['method'])}", "method")
    if url not in ENDPOINTS:
        raise error(f"must be one of {', '.join(ENDPOINTS)}, got {shown(url)}", "url")
    if not isinstance(body, dict):
        raise error(f"must be the JSON object that {url} takes, got {shown(body)}", "body")
    if body.get("stream"):
        raise error("answers of a batch are written as a whole; leave it out", "body.stream")
    if body.get("min_quality") is not None:
        raise error("answers of a batch must not depend on the load; set quality, or leave it out", "body.min_quality")
    if url == RESPONSES:
        for field, remedy in _OF_STORED_RESPONSES.items():
            if body.get(field):
                raise error(remedy, f"body.{field}")
    return BatchRequest(index, custom_id, url, body)
