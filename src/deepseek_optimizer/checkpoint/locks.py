"""Locks on files and directories, released when the process that holds them ends, however it ends."""

from __future__ import annotations

import os
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows: concurrent writers are not detected
    fcntl = None  # type: ignore[assignment]

HAS_LOCKS = fcntl is not None


def hold(path: Path) -> int:
    """A handle on `path` that holds its lock until it is closed.

    Raises:
        BlockingIOError: another handle holds it.
        FileNotFoundError: there is no such path, or it was removed or replaced meanwhile.
        OSError: the file system has no locks.
    """
    assert fcntl is not None
    handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not os.path.samestat(os.fstat(handle), os.lstat(path)):
            raise FileNotFoundError(f"{path} was replaced")
    except BaseException:
        os.close(handle)
        raise
    return handle
