"""Preparation of documents for questions: they are split into chunks, indexed if necessary, and cached for later questions.

Documents are split and searched on separate threads, each with its own tokenizer, so that chats do not wait for documents, nor
short documents for long ones. Clients take turns on each thread (see `fair_queue`).
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from threading import Event
from typing import Any, TypeVar
from weakref import WeakValueDictionary

from ...longdoc.document import Document
from ...longdoc.material import Limits, Material
from ...longdoc.prompts import Prompts
from ...longdoc.split import MAX_LENGTH, MIN_LENGTH, split
from ..http.caller import Caller
from ..http.fair_queue import FairQueue

T = TypeVar("T")
_Key = tuple[str, tuple[str, ...]]  # owner, and digests of the files

IDLE_SECONDS = 900.0
REPLY = 512  # tokens reserved for an answer if the request gives no maximum
_LONG = 1 << 18  # characters from which a document is processed on the thread for long ones
_EACH = 8  # approximate bytes of a prepared document per character: chunks, index, tokens
_PARTS = 6  # minimum number of chunks that fit a prompt


class _Stopped(Exception):
    """The document is not needed any more."""


class Preparation:
    """Prepares documents and caches them.

    Args:
        copied: returns a copy of the tokenizer.
        room: maximum number of tokens of prompt and answer together.
        max_bytes: of all cached documents; the newest one is cached regardless of its size.
        max_per_client, max_jobs: see `FairQueue`.
    """

    def __init__(
        self, copied: Callable[[Caller], Awaitable[Any]], room: int, max_bytes: int, max_per_client: int, max_jobs: int
    ) -> None:
        self.room, self._max = room, max_bytes
        self._copied = copied
        self._kept: OrderedDict[_Key, tuple[Material, float]] = OrderedDict()  # with the time of the last use
        self._making: WeakValueDictionary[_Key, asyncio.Lock] = WeakValueDictionary()
        self._copying = asyncio.Lock()
        self.queues = [
            FairQueue(name, 1, max_running=1, max_per_client=max_per_client, max_jobs=max_jobs)
            for name in ("short documents", "long documents", "citations")
        ]
        self._short, self._long, self._citing = self.queues
        self._prompts: Prompts | None = None  # of the thread for short documents, with its tokenizer
        self._splitter: Any = None  # tokenizer of the thread for long documents
        self.reply = min(REPLY, max(1, room // 4))

    async def material(self, owner: str, digests: tuple[str, ...], document: Document, caller: Caller) -> Material:
        """Returns the prepared document, from the cache if possible.

        Args:
            owner: salt of the API key that the files belong to.
            digests: of the document's files.
            document: the document.
            caller: who sent the request.

        Raises:
            ApiError: see `FairQueue.run`.
        """
        key = (owner, digests)
        async with self._making.setdefault(key, asyncio.Lock()):
            cached = self._kept.pop(key, None)
            material = cached[0] if cached is not None else await self._made(document, caller)
            self._kept[key] = material, time.monotonic()  # as the newest
        while len(self._kept) > 1 and sum(_bytes(one) for one, _ in self._kept.values()) > self._max:
            self._kept.popitem(last=False)
        return material

    def forget(self, owner: str, digest: str) -> None:
        """Removes everything from the cache that was made from a deleted file."""
        for key in [key for key in self._kept if key[0] == owner and digest in key[1]]:
            del self._kept[key]

    def sweep(self, idle: float = IDLE_SECONDS) -> None:
        """Removes documents that were not used for `idle` seconds from the cache."""
        now = time.monotonic()
        for key in [key for key, (_, used) in self._kept.items() if now - used >= idle]:
            del self._kept[key]

    async def step(self, client: str, work: Callable[[], T], deadline: float) -> T:
        """Runs work that uses a `Material`; arguments and errors: see `FairQueue.run`."""
        return await self._short.run(client, work, deadline)

    async def citing(self, client: str, work: Callable[[], T], deadline: float) -> T:
        """Runs work that uses neither a tokenizer nor an index; arguments and errors: see `FairQueue.run`."""
        return await self._citing.run(client, work, deadline)

    def close(self) -> None:
        """Ends the threads, and the process that renders templates."""
        for queue in self.queues:
            queue.close()
        if self._prompts is not None:
            self._prompts.close()

    async def _made(self, document: Document, caller: Caller) -> Material:
        long, stop = document.characters > _LONG, Event()
        async with self._copying:
            if self._prompts is None:
                self._prompts = Prompts(await self._copied(caller))
            if long and self._splitter is None:
                self._splitter = await self._copied(caller)
        prompts, tokenizer = self._prompts, self._splitter if long else self._prompts.tokenizer
        length = min(MAX_LENGTH, max(MIN_LENGTH, self.room // _PARTS))

        def check(_done: int, _all: int) -> None:
            if stop.is_set():
                raise _Stopped

        def make() -> Material:
            chunks = split(document, tokenizer, length, length // 8, progress=check)
            material = Material(document, chunks, prompts, Limits(self.room, reply=self.reply))
            if long:
                _ = material.index  # built here, not on the thread that short documents wait for
            return material

        try:
            queue = self._long if long else self._short
            return await queue.run(caller.key, make, caller.deadline)
        finally:
            stop.set()


def _bytes(material: Material) -> int:
    return _EACH * material.document.characters
