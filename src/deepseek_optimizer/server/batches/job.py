"""A batch: what a client asked for, and how far it is."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

ENDED: Final = frozenset({"completed", "failed", "expired", "cancelled"})


@dataclass
class Batch:
    """
    Attributes:
        id: as in the API.
        owner: salt of the API key.
        endpoint: the path of all its requests.
        input_file: id of the file of requests.
        window: as in the API: "24h".
        metadata: the client's.
        created, expires: Unix time in seconds.
        output_seconds: until the files of results expire; None: as in the settings.
        status: as in the API.
        times: Unix time in seconds at which other statuses began, by status.
        total, completed, failed: number of requests: all, those with an answer, and those with an error.
        output_file, error_file: ids of the files of answers and of errors; None: there are none, or not yet.
        errors: why it failed, in the API's form.
    """

    id: str
    owner: str
    endpoint: str
    input_file: str
    window: str
    metadata: dict[str, str] | None
    created: int
    expires: int
    output_seconds: float | None = None
    status: str = "validating"
    times: dict[str, int] = field(default_factory=dict)
    total: int = 0
    completed: int = 0
    failed: int = 0
    output_file: str | None = None
    error_file: str | None = None
    errors: list[dict[str, Any]] = field(default_factory=list)

    @property
    def ended(self) -> bool:
        """Whether the status is final."""
        return self.status in ENDED

    @property
    def cancelled(self) -> bool:
        """Whether the client cancelled it, and it had not ended."""
        return "cancelling" in self.times

    def file_id(self, kind: str) -> str:
        """The id of its file of a kind; always the same, so that writing it again replaces it."""
        return f"file-{hashlib.sha256(f'{self.id} {kind}'.encode()).hexdigest()[:24]}"

    def begin(self, status: str, now: float) -> None:
        """Sets the status and its time."""
        self.status = status
        self.times[status] = int(now)

    def fail(self, now: float, code: str, message: str, line: int | None = None, param: str | None = None) -> None:
        """Ends it with an error. `line`: of the file of requests; `param`: the field of the request there."""
        self.errors = [{"code": code, "line": line, "message": message, "param": param}]
        self.begin("cancelled" if self.cancelled else "failed", now)

    def to_json(self) -> bytes:
        """For `load_batch`."""
        return json.dumps(asdict(self)).encode()


def load_batch(path: Path) -> Batch:
    """The batch in a file that has the bytes of `Batch.to_json`.

    Raises:
        OSError, ValueError, TypeError: it cannot be read.
    """
    return Batch(**json.loads(path.read_bytes()))
