"""Work that would hold the event loop, on threads."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from .problems import late

T = TypeVar("T")


async def threaded(threads: ThreadPoolExecutor, work: Callable[[], T], deadline: float) -> T:
    """What the work returns.

    Args:
        deadline: of `time.monotonic`.

    Raises:
        ApiError: 504, it was not done by then.
    """
    future = asyncio.get_running_loop().run_in_executor(threads, work)
    try:
        return await asyncio.wait_for(future, max(0.01, deadline - time.monotonic()))
    except asyncio.TimeoutError:
        raise late() from None
