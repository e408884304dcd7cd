"""The database of stored responses: one table of SQLite, in memory or in a file.

Each row has the input items of one request and its response. A conversation is a chain of rows, so that a turn is stored once
however long the conversation gets. The file uses write-ahead logging and survives a crash of the process.
"""

from __future__ import annotations

import os
import sqlite3
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson
from filelock import FileLock, Timeout

from ...errors import ConfigError

_FILE, _LOCK = "responses.db", "responses.lock"
_VERSION = 1  # of the table
_MAX_TURNS = 10_000  # of a conversation
_OVERHEAD = 512  # bytes of a row besides its texts
_TABLE = """
CREATE TABLE responses (
    id TEXT PRIMARY KEY,
    owner TEXT NOT NULL,
    previous TEXT,
    status TEXT NOT NULL,
    background INTEGER NOT NULL,
    used REAL NOT NULL,
    size INTEGER NOT NULL,
    input BLOB NOT NULL,
    body BLOB NOT NULL
);
CREATE INDEX by_owner ON responses (owner, used);
CREATE INDEX by_use ON responses (used);
"""
_CHAIN = """
WITH RECURSIVE chain (id, previous, depth) AS (
    SELECT id, previous, 0 FROM responses WHERE id = ? AND owner = ?
    UNION ALL
    SELECT r.id, r.previous, depth + 1 FROM responses r JOIN chain c ON r.id = c.previous
    WHERE r.owner = ? AND depth < ?
)
"""
_OPEN = ("queued", "in_progress")  # statuses of responses that are not complete


@dataclass(frozen=True)
class Row:
    """A stored response.

    Attributes:
        id: as in the API.
        owner: salt of the API key.
        previous: id of the response that it continues; None: it begins a conversation.
        status: as in the API.
        background: whether it was generated in the background.
        input: JSON list of its request's input items.
        body: JSON of the response.
    """

    id: str
    owner: str
    previous: str | None
    status: str
    background: bool
    input: bytes
    body: bytes

    @property
    def size(self) -> int:
        """Bytes that count towards the limits."""
        return len(self.input) + len(self.body) + _OVERHEAD


class ResponseDatabase:
    """All methods block; any thread may call them.

    Args:
        folder: for the file, created if necessary; None: the database is in memory.
        max_bytes: maximum size of all rows; the oldest rows of the owner with the most bytes are deleted first.
        max_bytes_per_owner: maximum size of the rows of one owner.
        seconds: time after its last use at which a row is deleted.

    Raises:
        ConfigError: the folder cannot be used, another server uses it, or its file is not such a database.
    """

    def __init__(self, folder: Path | None, max_bytes: int, max_bytes_per_owner: int, seconds: float) -> None:
        self._max, self._max_per_owner, self._seconds = max_bytes, max_bytes_per_owner, seconds
        self._lock = threading.Lock()
        self._file_lock: FileLock | None = None
        self._held: Counter[str] = Counter()  # bytes of rows by owner
        try:
            self._open(folder)
        except (OSError, sqlite3.DatabaseError) as error:
            self._release()
            raise ConfigError(f"--state-dir: {folder} cannot be used: {error}") from None

    def _open(self, folder: Path | None) -> None:
        if folder is not None:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._file_lock = FileLock(folder / _LOCK, timeout=0, thread_local=False)  # another thread may release it
            try:
                self._file_lock.acquire()
            except Timeout:
                self._file_lock = None
                raise ConfigError(f"--state-dir: {folder} is in use by another server; give each its own") from None
            os.close(os.open(folder / _FILE, os.O_CREAT | os.O_RDWR, 0o600))
        self._database = sqlite3.connect(
            ":memory:" if folder is None else folder / _FILE, check_same_thread=False, isolation_level=None
        )
        if folder is not None:
            self._database.execute("PRAGMA journal_mode = WAL")
            self._database.execute("PRAGMA synchronous = NORMAL")
        (version,) = self._database.execute("PRAGMA user_version").fetchone()
        if version not in (0, _VERSION):
            raise ConfigError(f"--state-dir: {folder} was written by another version of this package; give another folder")
        if version == 0:
            self._database.executescript(f"BEGIN; {_TABLE} PRAGMA user_version = {_VERSION}; COMMIT;")
        self._count()
        self._end_open()

    def _count(self) -> None:
        self._held = Counter(dict(self._database.execute("SELECT owner, SUM(size) FROM responses GROUP BY owner")))

    def _end_open(self) -> None:
        """Marks responses as failed whose generation ended with the process that wrote them."""
        error = {"code": "server_error", "message": "the server stopped before the response was complete"}
        for id, body in self._database.execute(
            "SELECT id, body FROM responses WHERE status IN (?, ?)", _OPEN
        ).fetchall():  # fmt: skip
            failed = orjson.dumps({**orjson.loads(body), "status": "failed", "error": error})
            self._database.execute("UPDATE responses SET status = 'failed', body = ? WHERE id = ?", (failed, id))

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._lock:
            self._database.execute("BEGIN IMMEDIATE")
            try:
                yield self._database
            except BaseException:
                self._database.execute("ROLLBACK")
                self._count()
                raise
            self._database.execute("COMMIT")

    def put(self, row: Row) -> None:
        """Stores a response, and deletes others if there are too many bytes.

        Raises:
            sqlite3.Error: it cannot be written.
        """
        with self._transaction() as database:
            database.execute(
                "INSERT INTO responses VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (row.id, row.owner, row.previous, row.status, row.background, time.time(), row.size, row.input, row.body),
            )
            self._held[row.owner] += row.size
            self._make_room(row.owner)

    def update(self, owner: str, id: str, status: str, body: bytes) -> None:
        """Replaces a response; does nothing if it has been deleted.

        Raises:
            sqlite3.Error: it cannot be written.
        """
        with self._transaction() as database:
            found = database.execute("SELECT size, LENGTH(body) FROM responses WHERE id = ? AND owner = ?", (id, owner))
            sizes = found.fetchone()
            if sizes is None:
                return
            size = sizes[0] + len(body) - sizes[1]
            database.execute("UPDATE responses SET status = ?, body = ?, size = ? WHERE id = ?", (status, body, size, id))
            self._held[owner] += size - sizes[0]
            self._make_room(owner)

    def get(self, owner: str, id: str) -> Row | None:
        """A stored response; None: the owner has none with this id."""
        with self._lock:
            found = self._database.execute(
                "SELECT id, owner, previous, status, background, input, body FROM responses WHERE id = ? AND owner = ?",
                (id, owner),
            ).fetchone()
        return None if found is None else _row(found)

    def conversation(self, owner: str, id: str) -> list[Row]:
        """The responses of a conversation, from its first to this one, which count as used now. The first one has a `previous`
        if earlier ones have been deleted."""
        with self._transaction() as database:
            arguments = (id, owner, owner, _MAX_TURNS)
            database.execute(
                f"{_CHAIN} UPDATE responses SET used = ? WHERE id IN (SELECT id FROM chain)", (*arguments, time.time())
            )
            rows = database.execute(
                f"{_CHAIN} SELECT r.id, r.owner, r.previous, r.status, r.background, r.input, r.body "
                "FROM chain c JOIN responses r ON r.id = c.id ORDER BY c.depth DESC",
                arguments,
            ).fetchall()
        return [_row(row) for row in rows]

    def delete(self, owner: str, id: str) -> bool:
        """Deletes a response; returns whether there was one."""
        with self._transaction() as database:
            sizes = database.execute("SELECT size FROM responses WHERE id = ? AND owner = ?", (id, owner)).fetchall()
            database.execute("DELETE FROM responses WHERE id = ? AND owner = ?", (id, owner))
            self._subtract(owner, sum(size for (size,) in sizes))
        return bool(sizes)

    def sweep(self) -> None:
        """Deletes the responses whose time is over."""
        with self._transaction() as database:
            until = (time.time() - self._seconds,)
            for owner, size in database.execute(
                "SELECT owner, SUM(size) FROM responses WHERE used < ? GROUP BY owner", until
            ).fetchall():  # fmt: skip
                self._subtract(owner, size)
            database.execute("DELETE FROM responses WHERE used < ?", until)

    def close(self) -> None:
        """Closes the database; other methods must not be called any more."""
        with self._lock:
            self._database.close()
            self._release()

    def _make_room(self, owner: str) -> None:
        while self._held[owner] > self._max_per_owner:
            self._delete_oldest(owner)
        while self._held.total() > self._max:
            self._delete_oldest(self._held.most_common(1)[0][0])

    def _delete_oldest(self, owner: str) -> None:
        id, size = self._database.execute(
            "SELECT id, size FROM responses WHERE owner = ? ORDER BY used LIMIT 1", (owner,)
        ).fetchone()  # fmt: skip
        self._database.execute("DELETE FROM responses WHERE id = ?", (id,))
        self._subtract(owner, size)

    def _subtract(self, owner: str, size: int) -> None:
        self._held[owner] -= size
        if not self._held[owner]:
            del self._held[owner]

    def _release(self) -> None:
        if self._file_lock is not None:
            self._file_lock.release()


def _row(values: tuple[Any, ...]) -> Row:
    id, owner, previous, status, background, items, body = values
    return Row(id, owner, previous, status, bool(background), items, body)
