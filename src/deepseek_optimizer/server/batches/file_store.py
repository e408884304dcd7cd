"""Files of batches: uploaded requests, and results. They are on disk, and accessible only with the API key that uploaded them
or created the batch. Requests that a batch keeps after their file has been deleted count for the limits until the batch ends.

Each file has a description beside it, in JSON, which is written last. Names of files on disk are ids, which the server makes.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO

from ...checkpoint.atomic import atomic_file
from ..http.problems import ApiError, busy
from ..settings import ServerSettings

logger = logging.getLogger("deepseek_optimizer.server")
REQUESTS, RESULTS = "batch", "batch_output"  # purposes


@dataclass(frozen=True)
class BatchFile:
    """A file.

    Attributes:
        id: as in the API.
        owner: salt of the API key.
        name: as uploaded, or made for results.
        purpose: REQUESTS or RESULTS.
        size: in bytes.
        created, expires: Unix time in seconds.
    """

    id: str
    owner: str
    name: str
    purpose: str
    size: int
    created: int
    expires: int


class BatchFiles:
    """The files of a server. `add`, `writing`, `delete` and `sweep` wait for the disk, and any thread may call them.

    Args:
        folder: exists; files that are in it stay accessible.
        settings: the server's.
        clock: Unix time in seconds.
    """

    def __init__(self, folder: Path, settings: ServerSettings, clock: Callable[[], float] = time.time) -> None:
        self._folder, self._settings, self._clock = folder, settings, clock
        found: list[BatchFile] = []
        for path in folder.glob("*.json"):
            try:
                found.append(BatchFile(**json.loads(path.read_bytes())))
            except (OSError, ValueError, TypeError):
                logger.error("the description of a file of a batch, %s, is damaged; the file is not listed", path)
        for path in [*folder.glob(".*.tmp"), *folder.glob("*.jsonl")]:  # of a server that was killed
            if not path.with_suffix(".json").exists():
                path.unlink()
        self._files = {file.id: file for file in sorted(found, key=lambda file: file.created)}
        self._kept: dict[str, tuple[str, str, int]] = {}  # batch -> owner, file, and bytes of its requests
        self._adding: dict[str, tuple[str, int]] = {}  # file that is being written -> owner and bytes
        self._lock = threading.Lock()  # from the check for room until it is taken

    def path(self, file: BatchFile) -> Path:
        """Where the content is."""
        return self._folder / f"{file.id}.jsonl"

    def add(self, owner: str, id: str, name: str, data: bytes | bytearray, seconds: float | None = None) -> BatchFile:
        """Stores a file of requests.

        Args:
            owner: salt of the API key.
            id: for the API.
            name: as uploaded.
            data: the content.
            seconds: until it expires; None: as in the settings.

        Raises:
            ApiError: 413, the owner's files would exceed the limit; 503, all files would; 507, it cannot be written.
        """
        with self._lock:
            self.check_room(owner, len(data))
            self._adding[id] = owner, len(data)
        try:
            with self.writing(owner, id, name, REQUESTS, seconds) as out:
                out.write(data)
        except OSError as error:
            logger.error("a file of a batch cannot be written: %s", error)
            raise ApiError(507, "file: the server's disk cannot be written", param="file", code="storage_failed") from None
        finally:
            del self._adding[id]
        return self._files[id]

    def keep(self, batch: str, owner: str, file: str, size: int) -> None:
        """Counts the requests that a batch keeps, also when their file is deleted, until `release`.

        Args:
            batch: its id.
            owner: salt of the API key.
            file: id of the file of requests; batches of the same file keep the same bytes.
            size: of the requests, in bytes.
        """
        self._kept[batch] = owner, file, size

    def release(self, batch: str) -> None:
        """Ends `keep`: the batch has deleted its requests."""
        self._kept.pop(batch, None)

    def _deleted(self) -> dict[str, tuple[str, int]]:
        """File -> owner and bytes, of deleted files whose requests batches keep, and of those that are being written."""
        both = {file: (owner, size) for owner, file, size in list(self._kept.values())} | dict(self._adding)
        return {id: one for id, one in both.items() if id not in self._files}

    def check_room(self, owner: str, size: int = 0) -> None:
        """Checks whether an owner may add a file of `size` bytes. Results count for their owner, but do not keep others from
        adding files. Raises ApiError as `add` does."""
        settings, files = self._settings, list(self._files.values())
        adding = sum(of == owner for of, _ in list(self._adding.values()))
        if sum(file.owner == owner for file in files) + adding >= (count := settings.max_files_per_client):
            raise ApiError(
                400, f"file: a key may have at most {count} files for batches; delete some", param="file", code="too_many_files"
            )
        if not self.fits(owner, size):
            most = settings.max_batch_bytes_per_client / 1e6
            raise ApiError(
                413,
                f"file: your files for batches, and the requests of those that have not ended, would exceed the {most:,.0f} MB "
                "that a key may use; delete some, or cancel a batch",
                param="file", code="file_storage", headers={"Connection": "close"},
            )  # fmt: skip
        deleted = sum(size for _, size in self._deleted().values())
        if size + deleted + sum(file.size for file in files if file.purpose == REQUESTS) > settings.max_batch_bytes_total:
            raise busy("the server has no room for more files of batches now", 60)

    def fits(self, owner: str, size: int) -> bool:
        """Whether an owner's files may grow by `size` bytes."""
        used = sum(file.size for file in list(self._files.values()) if file.owner == owner)
        used += sum(size for of, size in self._deleted().values() if of == owner)
        return used + size <= self._settings.max_batch_bytes_per_client

    @contextmanager
    def writing(
        self, owner: str, id: str, name: str, purpose: str = RESULTS, seconds: float | None = None
    ) -> Iterator[BinaryIO]:
        """Yields a file to write to; it is listed when the context ends without an exception, and replaces one of this id.

        Raises:
            OSError: it cannot be written.
        """
        now = int(self._clock())
        with atomic_file(self._folder / f"{id}.jsonl") as out:
            yield out
            size = out.tell()
        lifetime = self._settings.batch_seconds if seconds is None else min(seconds, self._settings.batch_seconds)
        file = BatchFile(id, owner, name, purpose, size, now, int(now + lifetime))
        with atomic_file(self._folder / f"{id}.json") as out:
            out.write(json.dumps(asdict(file)).encode())
        self._files[id] = file

    def find(self, owner: str, id: str) -> BatchFile | None:
        """The owner's file with this id; None: there is none."""
        file = self._files.get(id)
        return file if file is not None and file.owner == owner and file.expires > self._clock() else None

    def of(self, owner: str) -> list[BatchFile]:
        """The files of an owner, oldest first."""
        now = self._clock()
        return [file for file in list(self._files.values()) if file.owner == owner and file.expires > now]

    def delete(self, file: BatchFile) -> None:
        """Deletes a file. What reads it already reads it to its end."""
        self._files.pop(file.id, None)
        for path in (self._folder / f"{file.id}.json", self.path(file)):
            path.unlink(missing_ok=True)

    def sweep(self) -> None:
        """Deletes expired files."""
        now = self._clock()
        for file in [file for file in list(self._files.values()) if file.expires <= now]:
            self.delete(file)
