"""Functions that wait for the disk, in a thread that is never left behind."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


async def in_thread(function: Callable[P, T], /, *args: P.args, **named: P.kwargs) -> T:
    """As `asyncio.to_thread`, but if it is cancelled, it ends when the function has ended: what the function writes to may then
    be closed."""
    work = asyncio.ensure_future(asyncio.to_thread(function, *args, **named))
    try:
        return await asyncio.shield(work)
    except asyncio.CancelledError:
        while not work.done():
            with suppress(asyncio.CancelledError):  # another one; the first is raised below
                await asyncio.wait({work})
        raise
    finally:
        if work.done() and not work.cancelled():
            work.exception()  # nobody else may read it
