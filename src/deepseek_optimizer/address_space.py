"""Whether torch can be loaded under `ulimit -v`. Where addresses run out while it is, its libraries abort the process, at a
place that changes with every megabyte: there is nothing to catch, so the limit is read before."""

from __future__ import annotations

import sys
from typing import Final

from .errors import NotEnoughMemoryError

LEAST: Final = 1280 << 20  # bytes; torch 2.13: 0.7 GB to import it and Transformers, 1.2 GB to serve a tiny model on 2 cores


def check_address_space() -> None:
    """Raises NotEnoughMemoryError where torch is not loaded yet and the process may have less than LEAST bytes of addresses."""
    try:
        import resource
    except ImportError:  # Windows has no such limit
        return
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if "torch" not in sys.modules and limit != resource.RLIM_INFINITY and limit < LEAST:
        remedy = "raise `ulimit -v`, or limit memory by a cgroup, which counts what is used and not what is reserved"
        raise NotEnoughMemoryError("the address space of torch, Transformers and their threads", LEAST, limit, remedy)
