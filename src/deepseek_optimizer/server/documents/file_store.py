"""The texts of uploaded files, stored in memory for a limited time and accessible only with the API key that uploaded them.

Nothing is written to disk, and everything is gone when the server stops. A name is a label and never a path.
"""

from __future__ import annotations

import secrets
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from ...longdoc.document import TextFile
from ..http.problems import ApiError, busy
from ..settings import ServerSettings

_OVERHEAD = 4096  # bytes of memory of a file besides its text


@dataclass(frozen=True)
class StoredFile:
    """An uploaded file.

    Attributes:
        id: as in the API.
        owner: salt of the API key that uploaded it.
        purpose: as in the API.
        size: bytes that were uploaded.
        digest: of those bytes and the name.
        created, expires: Unix time in seconds.
        text: the text that was read from it.
    """

    id: str
    owner: str
    purpose: str
    size: int
    digest: str
    created: int
    expires: int
    text: TextFile

    @property
    def held(self) -> int:
        """Bytes of memory that it takes."""
        return memory_of(self.text)


def memory_of(text: TextFile) -> int:
    """Bytes of memory that a text takes."""
    return sys.getsizeof(text.text) + 120 * len(text.pages) + 40 * len(text.headings) + _OVERHEAD


class Room:
    """Memory of a file while it is being received, before its text is stored."""

    def __init__(self, store: FileStore, owner: str) -> None:
        self._store, self._owner, self._bytes = store, owner, 0

    def set(self, size: int) -> None:
        """Sets the memory in use, in bytes.

        Raises:
            ApiError: 413, it exceeds the limit of the key; 503, it exceeds the total limit.
        """
        self._store.take(self._owner, size - self._bytes)
        self._bytes = size


class FileStore:
    """Stores files up to the limits of the settings.

    Args:
        settings: the server's.
        gone: called with owner and digest of each file that is deleted.
        clock: Unix time in seconds, for times in responses.
        running: a monotonic clock in seconds, by which files expire, so that adjusting the system clock deletes none.
    """

    def __init__(
        self,
        settings: ServerSettings,
        gone: Callable[[str, str], None] | None = None,
        clock: Callable[[], float] = time.time,
        running: Callable[[], float] = time.monotonic,
    ) -> None:
        self._settings, self._gone, self._clock, self._running = settings, gone, clock, running
        self._files: dict[str, StoredFile] = {}
        self._ends: dict[str, float] = {}  # when those files expire, by `running`
        self._taken = Counter[str]()  # bytes by owner
        self._coming = Counter[str]()  # uploads in progress, by client

    def __len__(self) -> int:
        return len(self._files)

    @property
    def held(self) -> int:
        """Bytes of memory that all files take, including uploads in progress."""
        return self._taken.total()

    @contextmanager
    def room(self, owner: str, client: str) -> Iterator[Room]:
        """Counts an upload and its memory until the end of the context; `add` then counts the memory of its text.

        Args:
            owner: salt of the API key.
            client: key of the client; without API keys, all files have the same owner.

        Raises:
            ApiError: 429, the client has too many uploads in progress; 503, all clients together have.
        """
        if self._coming[client] >= self._settings.max_uploads_per_client:
            raise ApiError(
                429,
                f"file: {self._coming[client]} of your files are being uploaded, which is the maximum; retry when some are "
                "done",
                code="queue_full", headers={"Retry-After": "1"},
            )  # fmt: skip
        if self._coming.total() >= self._settings.max_uploads_total:
            raise busy("the maximum number of files is being uploaded")
        room = Room(self, owner)
        self._coming[client] += 1
        try:
            yield room
        finally:
            self._coming[client] -= 1
            if not self._coming[client]:
                del self._coming[client]
            room.set(0)

    def take(self, owner: str, change: int) -> None:
        """Adds `change` bytes to an owner's memory. If it raises, see `Room.set`, nothing is changed."""
        if change > 0:
            self.sweep()
            if self._taken[owner] + change > self._settings.max_file_bytes_per_client:
                mb = self._settings.max_file_bytes_per_client / 1e6
                raise ApiError(
                    413, f"file: your files would exceed the {mb:,.0f} MB that a key may use; delete some", param="file",
                    code="file_memory", headers={"Connection": "close"},
                )  # fmt: skip
            if self.held + change > self._settings.max_file_bytes_total:
                raise busy("the server has no memory for more files now", 30)
        self._taken[owner] += change
        if not self._taken[owner]:
            del self._taken[owner]

    def add(self, owner: str, purpose: str, size: int, digest: str, text: TextFile, seconds: float | None = None) -> StoredFile:
        """Stores a text.

        Args:
            owner: salt of the API key.
            purpose: as in the API.
            size: bytes that were uploaded.
            digest: of those bytes and the name.
            text: what was read from them.
            seconds: until it expires, at most as many as in the settings; None: as in the settings.

        Raises:
            ApiError: 413 or 503, see `Room.set`; 400, the key has the maximum number of files.
        """
        self.sweep()
        if sum(file.owner == owner for file in self._files.values()) >= self._settings.max_files_per_client:
            raise ApiError(
                400,
                f"file: a key may have at most {self._settings.max_files_per_client} files; delete some",
                param="file",
                code="too_many_files",
            )
        now = self._clock()
        limit = self._settings.file_seconds
        lifetime = limit if seconds is None else min(seconds, limit)
        name = f"file-{secrets.token_hex(12)}"
        file = StoredFile(name, owner, purpose, size, digest, int(now), int(now + lifetime), text)
        self.take(owner, file.held)
        self._files[file.id], self._ends[file.id] = file, self._running() + lifetime
        return file

    def get(self, owner: str, id: str) -> StoredFile:
        """Returns the file with this id.

        Raises:
            ApiError: 404, the owner has no such file.
        """
        self.sweep()
        file = self._files.get(id)
        if file is None or file.owner != owner:
            raise ApiError(
                404, "there is no such file; files expire, or are lost when the server stops: upload it again", param="file_id",
                code="file_not_found",
            )  # fmt: skip
        return file

    def of(self, owner: str) -> list[StoredFile]:
        """The files of an owner, oldest first."""
        self.sweep()
        return [file for file in self._files.values() if file.owner == owner]

    def delete(self, owner: str, id: str) -> None:
        """Deletes a file. Answers in progress that use it are completed. Raises as `get` does."""
        self._remove(self.get(owner, id))

    def sweep(self) -> None:
        """Deletes expired files."""
        now = self._running()
        for file in [file for file in self._files.values() if self._ends[file.id] <= now]:
            self._remove(file)

    def _remove(self, file: StoredFile) -> None:
        del self._files[file.id], self._ends[file.id]
        self.take(file.owner, -file.held)
        if self._gone is not None and not any((f.owner, f.digest) == (file.owner, file.digest) for f in self._files.values()):
            self._gone(file.owner, file.digest)
