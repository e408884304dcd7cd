"""Documents made ready for questions: in chunks, with an index where one is needed, kept for the next question.

Documents are cut and searched on threads of their own, each with its own tokenizer: chats don't wait for them, and short
documents don't wait for long ones. Clients have their turns on each (see `fair_queue`).
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
_Key = tuple[str, tuple[str, ...]]  # whose, and the digests of its files

IDLE_SECONDS = 900.0
REPLY = 512  # tokens of an answer from a document that does not fit, where the request does not say
_LONG = 1 << 18  # characters of a document that others should not wait for
_EACH = 8  # bytes that a prepared document takes for each of its characters, about: chunks, index, tokens
_PARTS = 6  # chunks of such a size fit a prompt, at least


class _Stopped(Exception):
    """Nobody wants the document any more."""


class Preparation:
    """
    Args:
        copied: gives a copy of the tokenizer.
        room: tokens that prompt and answer may take together.
        max_bytes: that prepared documents may take together; the newest one is kept whatever it takes.
        max_per_client, most: as of `FairQueue`.
    """

    def __init__(
        self, copied: Callable[[Caller], Awaitable[Any]], room: int, max_bytes: int, max_per_client: int, most: int
    ) -> None:
        self.room, self._max = room, max_bytes
        self._copied = copied
        self._kept: OrderedDict[_Key, tuple[Material, float]] = OrderedDict()  # with when it was asked for last
        self._making: WeakValueDictionary[_Key, asyncio.Lock] = WeakValueDictionary()
        self._copying = asyncio.Lock()
        self.queues = [
            FairQueue(name, 1, max_running=1, max_per_client=max_per_client, most=most)
            for name in ("short documents", "long documents", "citations")
        ]
        self._short, self._long, self._citing = self.queues
        self._prompts: Prompts | None = None  # of the thread for short ones, with its tokenizer
        self._splitter: Any = None  # tokenizer of the thread for long ones
        self.reply = min(REPLY, max(1, room // 4))

    async def material(self, owner: str, digests: tuple[str, ...], document: Document, caller: Caller) -> Material:
        """A document's; kept by whose it is and what its files are.

        Args:
            owner: salt of the key whose it is.

        Raises:
            ApiError: as of `FairQueue.run`.
        """
        key = (owner, digests)
        async with self._making.setdefault(key, asyncio.Lock()):
            found = self._kept.pop(key, None)
            made = found[0] if found is not None else await self._made(document, caller)
            self._kept[key] = made, time.monotonic()  # as the newest
        while len(self._kept) > 1 and sum(_bytes(one) for one, _ in self._kept.values()) > self._max:
            self._kept.popitem(last=False)
        return made

    def forget(self, owner: str, digest: str) -> None:
        """Of a file that is gone: lets go of what was made of it."""
        for key in [key for key in self._kept if key[0] == owner and digest in key[1]]:
            del self._kept[key]

    def sweep(self, idle: float = IDLE_SECONDS) -> None:
        """Lets go of what nobody has asked about for so many seconds."""
        now = time.monotonic()
        for key in [key for key, (_, asked) in self._kept.items() if now - asked >= idle]:
            del self._kept[key]

    async def step(self, client: str, work: Callable[[], T], deadline: float) -> T:
        """Runs what uses a material; arguments and errors as of `FairQueue.run`."""
        return await self._short.run(client, work, deadline)

    async def citing(self, client: str, work: Callable[[], T], deadline: float) -> T:
        """Runs what uses neither tokenizer nor index; arguments and errors as of `FairQueue.run`."""
        return await self._citing.run(client, work, deadline)

    def close(self) -> None:
        """Ends the process that templates run in."""
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
            made = Material(document, chunks, prompts, Limits(self.room, reply=self.reply))
            if long:
                _ = made.index  # made here, and not where others wait
            return made

        try:
            queue = self._long if long else self._short
            return await queue.run(caller.key, make, caller.deadline)
        finally:
            stop.set()


def _bytes(material: Material) -> int:
    return _EACH * material.document.characters
