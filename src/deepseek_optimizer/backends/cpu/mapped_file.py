"""Files mapped into memory under the native library's watch: weights are read in place, and a file that is cut short or written
to meanwhile is a CheckpointChangedError of whatever read it, not a dead process.

A page that is gone faults in any thread that reads it, torch's and the interpreter's too, so the library's handler does not
unwind: it puts zeros there, and whoever has read asks before the results go out (`native/runtime/mapped_files.hpp`).

The file is looked at after each step as well (an fstat a file, under a microsecond), so that no token of weights that were
overwritten in place is given out. Size and time of modification count: a `touch` is taken for a change, since to tell one from
the other means to read the whole file, and a change within the tick of the clock (4 ms) in which the file was last written
before it was opened is not seen. A file that was replaced under its name, or removed, stays what it was for those who have
mapped it: that is no error.

The alternative, a copy in memory of our own, costs time and memory (`checkpoint/files.py` has figures) and is not shared by
processes that serve the same model. It is what serves where this library was not built.
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
    """A private mapping of a whole file: writing to it leaves the file alone. Watched from `watch` until it is unmapped."""

    _unwatch: Callable[[], None] | None = None

    def watch(self, fd: int, modified_ns: int, path: Path) -> None:
        """
        Raises:
            CheckpointChangedError: the file is not what it was at `modified_ns`.
        """
        address = C.addressof(C.c_char.from_buffer(self))
        self._unwatch = watch(address, len(self), fd, modified_ns, path)
        check(library().dso_mapping_check(address))

    def __del__(self) -> None:  # not weakref.finalize, which mmap calls when its place may be another mapping's already
        if self._unwatch is not None:
            self._unwatch()


def map_file(fd: int, size: int, modified_ns: int, path: Path) -> MappedFile:
    """The file `fd`, mapped and watched.

    Args:
        size, modified_ns: its size and time of modification when it was opened.
        path: for messages.

    Raises:
        CheckpointChangedError: it is not what it was when it was opened.
        CheckpointError: the system does not map it.
    """
    try:
        mapped = MappedFile(fd, size, access=mmap.ACCESS_COPY)
    except ValueError:  # it has fewer bytes by now
        raise CheckpointChangedError("was cut short while it was read", file=path) from None
    except OSError as error:
        raise CheckpointError(f"cannot be mapped: {error.strerror}", file=path) from error
    mapped.watch(fd, modified_ns, path)
    with contextlib.suppress(OSError):  # a kernel without huge pages
        mapped.madvise(mmap.MADV_HUGEPAGE)  # weights are read whole at every token: fewer pages, fewer misses
    mapped.madvise(mmap.MADV_WILLNEED)  # from a disk: one long read instead of a fault a page
    return mapped


def watch(address: int, size: int, fd: int, modified_ns: int, path: Path) -> Callable[[], None]:
    """Registers a mapping, whoever made it.

    Args:
        fd: of the file; -1: only pages that are gone are noticed.

    Returns: what ends it, to be called before the mapping is undone.
    """
    number = C.c_int64()
    check(library().dso_mapping_add(address, size, fd, modified_ns, os.fsencode(path), C.byref(number)))
    return functools.partial(library().dso_mapping_remove, number.value)


def check_address(address: int) -> None:
    """Raises CheckpointChangedError where the watched mapping that holds this address is not what was mapped."""
    check(library().dso_mapping_check(address))


def check_tensor(tensor: torch.Tensor) -> None:
    """`check_address` of where a tensor lies."""
    if tensor.device.type == "cpu":
        check_address(tensor.data_ptr())
