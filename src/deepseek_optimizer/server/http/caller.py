"""The client of a request, by which queues take turns."""

from __future__ import annotations

import asyncio
import ipaddress
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Final

from starlette.requests import ClientDisconnect, Request

# Key of an ASGI scope: the salt of the API key for which the server itself sends a request. No client can set it.
FOR_OWNER: Final = "deepseek_optimizer.owner"


@dataclass(frozen=True)
class Caller:
    """The client of a request, and the request's limits.

    Attributes:
        key: the client, see `client_of`.
        size: bytes of the request's body, which bound the work that its texts can cause.
        deadline: time of `time.monotonic` by which the answer must be complete.
        ignored: names of ignored fields of the request, which the response names in a header (see `ignored_fields`).
        adapter: name of the LoRA adapter that the request's `model` names; "": none.
    """

    key: str
    size: int
    deadline: float
    ignored: list[str] = field(default_factory=list, compare=False)
    adapter: str = ""


def client_of(salt: str, peer: Any) -> str:
    """A string that identifies a client: by its API key or, without keys, by the address of its connection. Other headers are
    not used, since clients can write anything in them.

    Args:
        salt: result of `ApiKeys.salt`; empty if the server needs no key.
        peer: (address, port) of the connection; None: unknown.
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
        if address.ipv4_mapped is None:  # a site usually has all addresses of a /64
            return f"peer {ipaddress.ip_network((address, 64), strict=False)}"
        address = address.ipv4_mapped
    return f"peer {address}"


@asynccontextmanager
async def cancel_on_disconnect(request: Request) -> AsyncIterator[None]:
    """A context whose body is cancelled when the client disconnects, so that jobs waiting in a queue never start. The request's
    body must have been read.

    Raises:
        ClientDisconnect: the client has disconnected.
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
        if hasattr(task, "uncancel"):  # Python 3.11 and later
            task.uncancel()
        raise ClientDisconnect from None
    finally:
        watcher.cancel()
