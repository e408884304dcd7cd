"""Files that clients have sent, as the texts that were read from them: in memory, each for the key that sent it, for a while.

Nothing is written to the disk, and all is gone when the server ends. A name is a label and never a path.
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

_BESIDES = 4096  # bytes that a file takes beside its text


@dataclass(frozen=True)
class StoredFile:
    """
    Attributes:
        owner: salt of the key that sent it.
        size: bytes that were sent.
        digest: of those bytes and the name.
        created, expires: seconds since 1970.
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
        """Bytes that it takes in memory."""
        return memory_of(self.text)


def memory_of(text: TextFile) -> int:
    """Bytes that a text takes."""
    return sys.getsizeof(text.text) + 120 * len(text.pages) + 40 * len(text.headings) + _BESIDES


class Room:
    """Memory that something takes while it comes in, before its text is kept."""

    def __init__(self, store: FileStore, owner: str) -> None:
        self._store, self._owner, self._bytes = store, owner, 0

    def set(self, size: int) -> None:
        """
        Raises:
            ApiError: 413, the key has no more room for it; 503, nobody has.
        """
        self._store.take(self._owner, size - self._bytes)
        self._bytes = size


class FileStore:
    """
    Args:
        gone: told the owner and digest of each file that is let go of.
        clock: seconds since 1970, for what clients are told.
        running: seconds that no one sets: files expire by them, so that a clock that is put right takes none away.
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
        self._ends: dict[str, float] = {}  # of those files, by `running`
        self._taken = Counter[str]()  # bytes by owner
        self._coming = Counter[str]()  # uploads on their way, by client

    def __len__(self) -> int:
        return len(self._files)

    @property
    def held(self) -> int:
        """Bytes that all files take, and what is coming in."""
        return self._taken.total()

    @contextmanager
    def room(self, owner: str, client: str) -> Iterator[Room]:
        """For what is being received. Its memory is free again at the end; `add` takes the text's own.

        Args:
            client: who sends it; without keys all files have one owner.

        Raises:
            ApiError: 429, the client is sending as many as it may; 503, all together are.
        """
        if self._coming[client] >= self._settings.max_uploads_per_client:
            raise ApiError(
                429, f"file: {self._coming[client]} of yours are being received, and no more are taken at once",
                code="queue_full", headers={"Retry-After": "1"},
            )  # fmt: skip
        if self._coming.total() >= self._settings.max_uploads_total:
            raise busy("the server is reading as many files as it can at once")
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
        """Counts memory in or out; raises as of `Room.set`, and has counted nothing then."""
        if change > 0:
            self.sweep()
            if self._taken[owner] + change > self._settings.max_file_bytes_per_client:
                mb = self._settings.max_file_bytes_per_client / 1e6
                raise ApiError(
                    413, f"file: with it your files take more than the {mb:,.0f} MB that a key has; delete some", param="file",
                    code="file_memory", headers={"Connection": "close"},
                )  # fmt: skip
            if self.held + change > self._settings.max_file_bytes_total:
                raise busy("there is no memory for more files now", 30)
        self._taken[owner] += change
        if not self._taken[owner]:
            del self._taken[owner]

    def add(self, owner: str, purpose: str, size: int, digest: str, text: TextFile, seconds: float | None = None) -> StoredFile:
        """Keeps a text.

        Args:
            seconds: until it expires; no more than what the settings say.

        Raises:
            ApiError: 413 or 503, there is no room; 400, the key has as many files as it may.
        """
        self.sweep()
        if sum(file.owner == owner for file in self._files.values()) >= self._settings.max_files_per_client:
            raise ApiError(
                400,
                f"file: a key may have {self._settings.max_files_per_client} files; delete some",
                param="file",
                code="too_many_files",
            )
        now = self._clock()
        most = self._settings.file_seconds
        kept = most if seconds is None else min(seconds, most)
        name = f"file-{secrets.token_hex(12)}"
        file = StoredFile(name, owner, purpose, size, digest, int(now), int(now + kept), text)
        self.take(owner, file.held)
        self._files[file.id], self._ends[file.id] = file, self._running() + kept
        return file

    def get(self, owner: str, id: str) -> StoredFile:
        """
        Raises:
            ApiError: 404, there is none of that id for this owner.
        """
        self.sweep()
        file = self._files.get(id)
        if file is None or file.owner != owner:
            raise ApiError(
                404, "there is no such file; files are kept in memory for a while, so send it again", param="file_id",
                code="file_not_found",
            )  # fmt: skip
        return file

    def of(self, owner: str) -> list[StoredFile]:
        """An owner's files, the oldest first."""
        self.sweep()
        return [file for file in self._files.values() if file.owner == owner]

    def delete(self, owner: str, id: str) -> None:
        """Whoever is being answered from it is answered to the end. Raises as `get` does."""
        self._remove(self.get(owner, id))

    def sweep(self) -> None:
        """Lets go of what has expired."""
        now = self._running()
        for file in [file for file in self._files.values() if self._ends[file.id] <= now]:
            self._remove(file)

    def _remove(self, file: StoredFile) -> None:
        del self._files[file.id], self._ends[file.id]
        self.take(file.owner, -file.held)
        if self._gone is not None and not any((f.owner, f.digest) == (file.owner, file.digest) for f in self._files.values()):
            self._gone(file.owner, file.digest)
