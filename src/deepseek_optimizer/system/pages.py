"""Anonymous memory in huge pages."""

from __future__ import annotations

import contextlib
import mmap
from typing import Any


def private_pages(size: int) -> mmap.mmap:
    """Memory of `size` bytes, zero, in huge pages where the kernel provides them. It is released with the last object that
    refers to it.

    Raises:
        OSError: there is no memory or address space.
    """
    # Private: with shared mappings, Python's default, a forked process would write into its parent's memory.
    own: dict[str, Any] = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
    pages = mmap.mmap(-1, size, **own)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # the kernel may not support them
            pages.madvise(mmap.MADV_HUGEPAGE)
    return pages
