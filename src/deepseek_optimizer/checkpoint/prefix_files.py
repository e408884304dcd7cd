"""A prefix cache in files, which outlives the process: each file holds a cache block, or the recurrent states after one.

    DIRECTORY/<fingerprint>/<key>.<group>     a block of a group of layers
    DIRECTORY/<fingerprint>/<key>.states      recurrent states

    8 bytes "DSOPREFX" | uint32 format version | int32 group, -1 for states | fingerprint [16] | key [16]
    | uint64 length of the content | first 16 bytes of SHA-256 of everything before and the content | content

All integers are little-endian. The fingerprint stands for everything that the content depends on besides the text: weights,
formats, backend. The key is the hash of the salt and of the text up to the end of the block (`cache.prefix_cache.keys`). A file
is written under a temporary name and renamed, never changed, and found by its name alone: several processes may share a
directory. A file that is not exactly as it was written is deleted when it is read.

The time of the last use is the file's modification time. The size limit holds for the whole directory: before it would be
exceeded, the least recently used files are deleted, under a lock on the directory. Since another process may write meanwhile,
the directory is measured again after every sixteenth of the limit; each process may exceed it by that much.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import struct
import tempfile
import time
from contextlib import suppress
from pathlib import Path

from ..errors import ConfigError
from .locks import HAS_LOCKS, hold

_log = logging.getLogger(__name__)
_MAGIC, _VERSION, _DIGEST = b"DSOPREFX", 2, 16
_HEADER = struct.Struct(f"<8sIi{_DIGEST}s{_DIGEST}sQ")
_FOLDER = re.compile(r"[0-9a-f]{32}")
_PARTS = 16  # the directory is measured again after this part of the limit was written
_ABANDONED = 3600.0  # seconds after which a temporary file belongs to a process that was killed
_STATES = -1


class PrefixFiles:
    """The files of one model in a directory. Methods may be called by several threads.

    Args:
        directory: the directory; created with mode 0700 if it does not exist.
        fingerprint: 16 bytes, equal only for engines whose blocks are interchangeable.
        max_bytes: maximum size of all files in the directory, those of other models included.
        block_bytes, state_bytes: size of a block's content, and of states'.

    Attributes:
        size: bytes of the directory's files when it was last measured, and of those written since.
        written_files, written_bytes, evicted_files, damaged_files: counts since the start.

    Raises:
        ConfigError: the directory cannot be used.
    """

    def __init__(
        self, directory: str | os.PathLike[str], fingerprint: bytes, max_bytes: int, block_bytes: int, state_bytes: int = 0
    ) -> None:
        self.directory, self._fingerprint, self.max_bytes = Path(os.path.realpath(directory)), fingerprint, max_bytes
        self._block_bytes, self._state_bytes = block_bytes, state_bytes
        self._folder = self.directory / fingerprint.hex()
        self.size = self._since = 0
        self.written_files = self.written_bytes = self.evicted_files = self.damaged_files = 0
        needed = max(block_bytes, state_bytes) + _HEADER.size + _DIGEST
        if max_bytes < needed:
            raise ConfigError(
                f"prefix_cache_bytes must be at least {needed:,}, the size of a block of this model, got {max_bytes:,}"
            )
        try:
            self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._folder.mkdir(mode=0o700, exist_ok=True)
            self._make_private()
            self._measure(0)
        except OSError as error:
            raise ConfigError(f"prefix_cache_dir: {self.directory} cannot be used: {error.strerror}") from None

    def _make_private(self) -> None:
        """Ensures that other users can neither read nor replace the files."""
        status = self._folder.lstat()
        if hasattr(os, "geteuid") and status.st_uid != os.geteuid():
            raise ConfigError(f"prefix_cache_dir: {self._folder} belongs to another user; choose another directory")
        if status.st_mode & 0o077:
            self._folder.chmod(0o700)

    def has(self, key: bytes, group: int) -> bool:
        """Whether there is a file, which may be damaged, of a block or, for group -1, of states."""
        return os.path.exists(self._path(key, group))

    def read(self, key: bytes, group: int) -> bytes | None:
        """The content of a file; None: there is none, or it was damaged and has been deleted."""
        path, size = self._path(key, group), self._state_bytes if group == _STATES else self._block_bytes
        try:
            with open(path, "rb", buffering=0, opener=_no_links) as file:
                whole = os.fstat(file.fileno()).st_size == _HEADER.size + _DIGEST + size
                header, digest, content = (file.read(n) for n in (_HEADER.size, _DIGEST, size if whole else 0))
        except FileNotFoundError:
            return None
        except OSError as error:
            _log.warning("a file of the prefix cache cannot be read, and its text is processed again: %s", error)
            return None
        if not whole or header != self._header(key, group, size) or _digest(header, content) != digest:
            self.damaged_files += 1
            name = os.path.basename(path)
            _log.warning("%s in the prefix cache is damaged; it is deleted, and its text is processed again", name)
            with suppress(OSError):
                os.unlink(path)
            return None
        return content

    def touch(self, key: bytes, group: int, used_ns: int) -> bool:
        """Sets the time of a file's last use, in nanoseconds since the epoch; returns whether there is such a file."""
        try:
            os.utime(self._path(key, group), ns=(used_ns, used_ns))
        except FileNotFoundError:
            return False
        return True

    def write(self, key: bytes, group: int, content: bytes, used_ns: int) -> None:
        """Writes a file, and first deletes the least recently used ones if necessary.

        Raises:
            OSError: such as a full disk; there is no file, or an earlier one of the same name.
        """
        header = self._header(key, group, len(content))
        size = len(header) + _DIGEST + len(content)
        if self.size + size > self.max_bytes or self._since + size > self.max_bytes // _PARTS:
            self._measure(size)
        handle, temporary = tempfile.mkstemp(prefix=".", suffix=".tmp", dir=self._folder)  # mode 0600
        try:
            with open(handle, "wb") as file:
                file.write(header + _digest(header, content))
                file.write(content)
            os.utime(temporary, ns=(used_ns, used_ns))
            os.replace(temporary, self._path(key, group))
        except BaseException:
            with suppress(OSError):
                os.unlink(temporary)
            raise
        self.size += size
        self._since += size
        self.written_files += 1
        self.written_bytes += size

    def _path(self, key: bytes, group: int) -> str:
        return f"{self._folder}{os.sep}{key.hex()}.{'states' if group == _STATES else group}"

    def _header(self, key: bytes, group: int, size: int) -> bytes:
        return _HEADER.pack(_MAGIC, _VERSION, group, self._fingerprint, key, size)

    def _measure(self, needed: int) -> None:
        """Measures the directory and, if there is less room than `needed` bytes, deletes the least recently used files."""
        files = self._files()
        self.size, self._since = sum(size for _, size, _ in files), 0
        if self.size + needed <= self.max_bytes:
            return
        try:
            lock = hold(self.directory) if HAS_LOCKS else None
        except BlockingIOError:  # another process is deleting files
            return
        except OSError:  # a file system without locks
            lock = None
        try:
            files = sorted(self._files())
            self.size = sum(size for _, size, _ in files)
            target = self.max_bytes - max(needed, self.max_bytes // _PARTS)
            for _, size, path in files:
                if self.size <= target:
                    break
                if path.endswith(".tmp"):  # being written
                    continue
                with suppress(FileNotFoundError):
                    os.unlink(path)
                    self.evicted_files += 1
                self.size -= size
        finally:
            if lock is not None:
                os.close(lock)

    def _files(self) -> list[tuple[int, int, str]]:
        """Time of last use in nanoseconds, size and path of every file, of all models. Deletes abandoned temporary files."""
        files = []
        for folder in os.scandir(self.directory):
            if not _FOLDER.fullmatch(folder.name) or not folder.is_dir(follow_symlinks=False):
                continue
            for file in os.scandir(folder.path):
                try:
                    status = file.stat(follow_symlinks=False)
                    if file.name.endswith(".tmp") and status.st_mtime < time.time() - _ABANDONED:
                        os.unlink(file.path)
                    else:
                        files.append((status.st_mtime_ns, status.st_size, file.path))
                except FileNotFoundError:  # deleted meanwhile
                    pass
        return files


def _no_links(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0))


def _digest(header: bytes, content: bytes) -> bytes:
    hashed = hashlib.sha256(header)  # with the CPU's instructions for it, twice as fast as BLAKE2b
    hashed.update(content)
    return hashed.digest()[:_DIGEST]
