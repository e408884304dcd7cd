"""Checks whether torch can be imported under `ulimit -v`.

If the address space runs out during the import, torch's libraries abort the process without an exception that could be
caught, so the limit is checked beforehand.
"""

from __future__ import annotations

import sys
from typing import Final

from .errors import NotEnoughMemoryError

MIN_BYTES: Final = 1280 << 20  # torch 2.13: 0.7 GB to import it and Transformers, 1.2 GB to serve a tiny model on 2 cores


def check_address_space() -> None:
    """Raises NotEnoughMemoryError if torch is not imported yet and the limit on address space is below MIN_BYTES."""
    try:
        import resource
    except ImportError:  # Windows has no such limit
        return
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if "torch" not in sys.modules and limit != resource.RLIM_INFINITY and limit < MIN_BYTES:
        remedy = "raise `ulimit -v`, or limit memory with a cgroup, which counts used instead of reserved memory"
        raise NotEnoughMemoryError("the address space of torch, Transformers and their threads", MIN_BYTES, limit, remedy)
