"""Files mapped into memory and monitored by the native library: weights are read in place, and if the file is truncated or
written to, the reader raises CheckpointChangedError instead of the process being killed.

A missing page faults in whichever thread reads it, including torch's and the interpreter's, so the library's handler does not
unwind: it maps zeros there, and the call that read them checks before it returns results (`native/runtime/mapped_files.hpp`).

The file is also checked after each step (one fstat per file, under a microsecond), so that no token computed from overwritten
weights is returned. The check compares size and modification time: a `touch` counts as a change, because telling it from a real
one would require reading the whole file; a change within the clock tick (4 ms) of the last write before the file was opened is
not detected. A file that was replaced under its name, or removed, stays unchanged for processes that have mapped it: this is
not an error, and a server logs it once.

The alternative, a private copy in memory, costs time and memory (`checkpoint/files.py` has figures) and is not shared by
processes that serve the same model. It is used where this library was not built.
"""

from __future__ import annotations

import contextlib
import ctypes as C
import functools
import mmap
import os
from collections.abc import Callable
from pathlib import Path

import torch

from ...errors import CheckpointChangedError, CheckpointError
from .native import check, library


class MappedFile(mmap.mmap):
    """A private mapping of a whole file: writing to it does not change the file. Monitored from `watch` until unmapped."""

    _unwatch: Callable[[], None] | None = None

    def watch(self, fd: int, modified_ns: int, path: Path) -> None:
        """Starts monitoring.

        Args:
            fd: file descriptor of the mapped file.
            modified_ns: its modification time when it was opened.
            path: for messages and `replaced`.

        Raises:
            CheckpointChangedError: the file has changed since `modified_ns`.
        """
        self._path, self._identity = path, _identity(os.fstat(fd))
        address = C.addressof(C.c_char.from_buffer(self))
        self._unwatch = watch(address, len(self), fd, modified_ns, path)
        check(library().dso_mapping_check(address))

    def replaced(self) -> Path | None:
        """The file's path if it now leads to another file or to none; None: it is still the mapped file."""
        try:
            return None if _identity(os.stat(self._path)) == self._identity else self._path
        except OSError:
            return self._path

    def __del__(self) -> None:  # not weakref.finalize, which mmap calls when its address may already belong to another mapping
        if self._unwatch is not None:
            self._unwatch()


def map_file(fd: int, size: int, modified_ns: int, path: Path) -> MappedFile:
    """Maps and monitors a file.

    Args:
        fd: its file descriptor.
        size, modified_ns: its size in bytes and modification time when it was opened.
        path: for messages.

    Raises:
        CheckpointChangedError: the file has changed since it was opened.
        CheckpointError: the system cannot map it.
    """
    try:
        mapped = MappedFile(fd, size, access=mmap.ACCESS_COPY)
    except ValueError:  # the file is shorter than `size` now
        raise CheckpointChangedError("was cut short while it was read", file=path) from None
    except OSError as error:
        raise CheckpointError(f"cannot be mapped: {error.strerror}", file=path) from error
    mapped.watch(fd, modified_ns, path)
    if hasattr(mmap, "MADV_HUGEPAGE"):  # Linux
        with contextlib.suppress(OSError):  # the kernel may not support huge pages
            mapped.madvise(mmap.MADV_HUGEPAGE)  # all weights are read for every token: fewer pages, fewer TLB misses
    if hasattr(mapped, "madvise"):  # not Windows
        mapped.madvise(mmap.MADV_WILLNEED)  # from a disk: one long read instead of one fault per page
    return mapped


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino


def watch(address: int, size: int, fd: int, modified_ns: int, path: Path) -> Callable[[], None]:
    """Registers a mapping for monitoring.

    Args:
        address, size: the mapped memory, in bytes.
        fd: file descriptor; -1: only missing pages are detected.
        modified_ns: the file's modification time when it was opened.
        path: for messages.

    Returns: a function that unregisters it, to be called before the memory is unmapped.
    """
    number = C.c_int64()
    check(library().dso_mapping_add(address, size, fd, modified_ns, os.fsencode(path), C.byref(number)))
    return functools.partial(library().dso_mapping_remove, number.value)


def check_address(address: int) -> None:
    """Raises CheckpointChangedError if the file of the monitored mapping that contains this address has changed."""
    check(library().dso_mapping_check(address))


def check_tensor(tensor: torch.Tensor) -> None:
    """`check_address` for a tensor's memory."""
    if tensor.device.type == "cpu":
        check_address(tensor.data_ptr())
