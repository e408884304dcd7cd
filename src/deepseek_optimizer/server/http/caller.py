"""Who asks: whose turn it is in the queues that requests wait in."""

from __future__ import annotations

import asyncio
import ipaddress
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from starlette.requests import ClientDisconnect, Request


@dataclass(frozen=True)
class Caller:
    """
    Attributes:
        key: of `client_of`.
        size: bytes of the request's body, which bound the work that its texts can make.
        deadline: of `time.monotonic`, by which it must have been answered.
    """

    key: str
    size: int
    deadline: float


def client_of(salt: str, peer: Any) -> str:
    """What tells clients apart: the API key, or without keys the address of its connection. Other headers don't count, since
    clients write what they like there.

    Args:
        salt: of `ApiKeys.salt`; empty where the server asks for no key.
        peer: (address, port) of the connection; None: not known.
    """
    if salt:
        return f"key {salt}"
    if not peer:
        return "peer"
    try:
        address = ipaddress.ip_address(str(peer[0]).partition("%")[0])
    except ValueError:
        return f"peer {peer[0]}"
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped is None:  # one site has all addresses of a /64
            return f"peer {ipaddress.ip_network((address, 64), strict=False)}"
        address = address.ipv4_mapped
    return f"peer {address}"


@asynccontextmanager
async def unless_gone(request: Request) -> AsyncIterator[None]:
    """What is in it is cancelled when the client leaves, so that what waits in a queue is never begun. The body must have been
    read.

    Raises:
        ClientDisconnect: it has left.
    """
    task = asyncio.current_task()
    assert task is not None
    gone = False

    async def watch() -> None:
        nonlocal gone
        while (await request.receive())["type"] != "http.disconnect":
            pass
        gone = True
        task.cancel()

    watcher = asyncio.ensure_future(watch())
    try:
        yield
    except asyncio.CancelledError:
        if not gone:
            raise
        if hasattr(task, "uncancel"):  # from Python 3.11 on
            task.uncancel()
        raise ClientDisconnect from None
    finally:
        watcher.cancel()
