"""Work on threads for many clients, in turns: whoever sends much waits for themselves, and nobody else does.

A client is an API key, or without keys an address (`Caller.key`). Clients that wait get their turns one after the other, each
with one job, whatever the others have sent. A client may hold so many jobs, waiting and running, and so many that run at once;
what it sends beyond is refused. Jobs of those who leave while they wait are never begun. A job that was begun runs to its end,
whether or not anybody still wants to know, and keeps its place until then: threads cannot be stopped.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

from .problems import ApiError, busy, late

T = TypeVar("T")


@dataclass
class QueueCounts:
    """
    Attributes:
        jobs: by how they ended: "done" (also with an error of their own), "refused" (too many), "late", "left" (their client,
            before they had begun).
        waited: seconds that those which were begun had waited, all together.
        ran: seconds that they took.
    """

    jobs: Counter[str] = field(default_factory=Counter)
    waited: float = 0.0
    ran: float = 0.0


class FairQueue:
    """
    Args:
        name: of what is done, for errors and metrics.
        places: jobs that run at once.
        max_running: of a client's jobs, that run at once: less than `places` keeps one for the others.
        max_per_client: jobs that a client may hold.
        most: jobs that all may hold together.
        share: of the time that a client's jobs may run; after one of t seconds its next begins t * (1 / share - 1) later at the
            earliest. For work that slows everybody while it runs, since it holds the interpreter.
    """

    def __init__(self, name: str, places: int, *, max_running: int, max_per_client: int, most: int, share: float = 1.0) -> None:
        self.name, self.counts = name, QueueCounts()
        self._free, self._max_running, self._max_per_client, self._max = places, max_running, max_per_client, most
        self._rest = 1 / share - 1  # seconds for each second that a job ran
        self._resting: set[str] = set()
        self._threads = ThreadPoolExecutor(places, f"dso-{name.replace(' ', '-')}")
        self._waiting: OrderedDict[str, deque[asyncio.Future[None]]] = OrderedDict()  # the next to have a turn comes first
        self._held, self._running = Counter[str](), Counter[str]()

    @property
    def waiting(self) -> int:
        """Jobs that have not begun."""
        return self._held.total() - self.running

    @property
    def running(self) -> int:
        """Jobs that have begun."""
        return self._running.total()

    async def run(self, key: str, work: Callable[[], T], deadline: float) -> T:
        """What the work returns, or raises.

        Args:
            key: whose it is.
            work: called once, on a thread; or never, if the caller is cancelled before its turn comes.
            deadline: of `time.monotonic`.

        Raises:
            ApiError: 429, the client holds as many jobs as it may; 503, all together do; 504, it was not done by the deadline.
        """
        self._check(key)
        arrived = time.monotonic()
        await self._turn(key, deadline)
        began = time.monotonic()  # no await lies between the turn and the thread: nobody can leave in between
        self.counts.waited += began - arrived
        loop = asyncio.get_running_loop()
        job = self._threads.submit(work)
        job.add_done_callback(lambda _: _on(loop, self._ended, key, began))
        return await self._result(job, deadline)

    def close(self) -> None:
        """Begins no more jobs; their callers are cancelled."""
        for waiters in self._waiting.values():
            for waiter in waiters:
                waiter.cancel()
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _check(self, key: str) -> None:
        if self._held[key] >= self._max_per_client:
            self.counts.jobs["refused"] += 1
            raise ApiError(
                429, f"{self.name}: {self._held[key]} of your requests wait for it, and no more are taken; let some end first",
                code="queue_full", headers={"Retry-After": "1"},
            )  # fmt: skip
        if self._held.total() >= self._max:
            self.counts.jobs["refused"] += 1
            raise busy(f"{self.name}: as many requests wait for it as the server takes")

    async def _turn(self, key: str, deadline: float) -> None:
        """Waits until the job may run; it counts as running from then on."""
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._held[key] += 1
        self._waiting.setdefault(key, deque()).append(waiter)
        self._grant()
        try:
            if not waiter.done():
                await asyncio.wait({waiter}, timeout=max(0.01, deadline - time.monotonic()))
        except BaseException:
            self._leave(key, waiter, "left")
            raise
        if waiter.cancelled():
            self._leave(key, waiter, "left")
            raise asyncio.CancelledError
        if not waiter.done():
            self._leave(key, waiter, "late")
            raise late()

    def _grant(self) -> None:
        """Lets begin whoever may, in turns."""
        while self._free:
            key = next((key for key in self._waiting if self._may_begin(key)), None)
            if key is None:
                return
            waiters = self._waiting[key]
            waiter = waiters.popleft()
            if waiters:
                self._waiting.move_to_end(key)
            else:
                del self._waiting[key]
            self._free -= 1
            self._running[key] += 1
            waiter.set_result(None)

    def _may_begin(self, key: str) -> bool:
        return key not in self._resting and self._running[key] < self._max_running

    def _leave(self, key: str, waiter: asyncio.Future[None], how: str) -> None:
        """Of a job that does not begin, whether or not its turn had come."""
        self.counts.jobs[how] += 1
        if waiter.done() and not waiter.cancelled():
            self._give_back(key)
        else:
            waiters = self._waiting.get(key)
            if waiters is not None and waiter in waiters:
                waiters.remove(waiter)
                if not waiters:
                    del self._waiting[key]
        self._drop(self._held, key)

    def _ended(self, key: str, began: float) -> None:
        ran = time.monotonic() - began
        self.counts.jobs["done"] += 1
        self.counts.ran += ran
        self._drop(self._held, key)
        if self._rest:
            self._resting.add(key)
            asyncio.get_running_loop().call_later(ran * self._rest, self._rested, key)
        self._give_back(key)

    def _rested(self, key: str) -> None:
        self._resting.discard(key)
        self._grant()

    def _give_back(self, key: str) -> None:
        self._drop(self._running, key)
        self._free += 1
        self._grant()

    @staticmethod
    def _drop(counter: Counter[str], key: str) -> None:
        counter[key] -= 1
        if not counter[key]:
            del counter[key]  # or there would be one for each client that ever came

    async def _result(self, job: Future[T], deadline: float) -> T:
        result = asyncio.wrap_future(job)
        try:
            await asyncio.wait({result}, timeout=max(0.01, deadline - time.monotonic()))
        finally:
            if not result.done():
                result.add_done_callback(_look)
        if not result.done():
            raise late()
        return result.result()


def _look(result: asyncio.Future[Any]) -> None:
    """At what nobody waits for any more: asyncio would log that nobody did."""
    if not result.cancelled():
        result.exception()


def _on(loop: asyncio.AbstractEventLoop, call: Callable[..., None], *args: Any) -> None:
    """Calls it on the loop's thread, unless the loop is gone."""
    try:
        loop.call_soon_threadsafe(call, *args)
    except RuntimeError:
        pass
