"""A thread pool that serves clients round-robin, so that many requests of one client delay no other client.

A client is an API key or, without keys, an address (`Caller.key`). Clients with waiting jobs take turns, one job per turn.
The number of jobs of a client, waiting and running, is limited, and so is the number that run at once; further jobs are
refused. If a client disconnects, its waiting jobs never start. A running job continues to its end and occupies its place until
then, even if its client is gone, because threads cannot be stopped.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

from .problems import ApiError, busy, timed_out

T = TypeVar("T")


@dataclass
class QueueCounts:
    """Totals of a queue.

    Attributes:
        jobs: number of jobs by outcome: "done" (including those that raised), "refused" (too many), "late" (not started by the
            deadline), "left" (the client disconnected before the start).
        waited: seconds that started jobs had waited, in total.
        ran: seconds that they ran, in total.
    """

    jobs: Counter[str] = field(default_factory=Counter)
    waited: float = 0.0
    ran: float = 0.0


class FairQueue:
    """A queue for one kind of work.

    Args:
        name: of the work, for errors and metrics.
        places: maximum number of running jobs.
        max_running: maximum number of running jobs of one client; less than `places` reserves places for other clients.
        max_per_client: maximum number of jobs of one client, waiting and running.
        max_jobs: maximum number of jobs of all clients.
        share: fraction of the time that a client's jobs may run: after a job of t seconds, its next one starts at least
            t * (1 / share - 1) seconds later. For work that holds the interpreter lock and so delays everything else.
    """

    def __init__(
        self, name: str, places: int, *, max_running: int, max_per_client: int, max_jobs: int, share: float = 1.0
    ) -> None:
        self.name, self.counts = name, QueueCounts()
        self._free, self._max_running, self._max_per_client, self._max = places, max_running, max_per_client, max_jobs
        self._rest = 1 / share - 1  # seconds of rest for each second that a job ran
        self._resting: set[str] = set()
        self._threads = ThreadPoolExecutor(places, f"dso-{name.replace(' ', '-')}")
        self._waiting: OrderedDict[str, deque[asyncio.Future[None]]] = (
            OrderedDict()
        )  # the client with the next turn comes first
        self._held, self._running = Counter[str](), Counter[str]()

    @property
    def waiting(self) -> int:
        """Number of jobs that have not started."""
        return self._held.total() - self.running

    @property
    def running(self) -> int:
        """Number of jobs that are running."""
        return self._running.total()

    async def run(self, key: str, work: Callable[[], T], deadline: float) -> T:
        """Runs `work` on a thread when it is the client's turn; returns its result, or raises its exception.

        Args:
            key: the client.
            work: called once; never if the caller is cancelled before its turn.
            deadline: a time of `time.monotonic`.

        Raises:
            ApiError: 429, the client has too many jobs; 503, all clients together have; 504, it was not done by the deadline.
        """
        self._check(key)
        arrived = time.monotonic()
        await self._turn(key, deadline)
        began = time.monotonic()  # no await between the turn and the thread, so the caller cannot be cancelled in between
        self.counts.waited += began - arrived
        loop = asyncio.get_running_loop()
        job = self._threads.submit(work)
        job.add_done_callback(lambda _: _on(loop, self._ended, key, began))
        return await self._result(job, deadline)

    def close(self) -> None:
        """Starts no more jobs, and cancels the callers of those that wait."""
        for waiters in self._waiting.values():
            for waiter in waiters:
                waiter.cancel()
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _check(self, key: str) -> None:
        if self._held[key] >= self._max_per_client:
            self.counts.jobs["refused"] += 1
            raise ApiError(
                429,
                f"{self.name}: {self._held[key]} of your requests are waiting, which is the maximum; retry when some are done",
                code="queue_full", headers={"Retry-After": "1"},
            )  # fmt: skip
        if self._held.total() >= self._max:
            self.counts.jobs["refused"] += 1
            raise busy(f"{self.name}: the server has the maximum number of waiting requests")

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
            raise timed_out()

    def _grant(self) -> None:
        """Starts waiting jobs while there are free places, one client after the other."""
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
        """Removes a job that will not start, whether or not its turn had come; `how`: the outcome to count."""
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
            del counter[key]  # otherwise entries of past clients would accumulate

    async def _result(self, job: Future[T], deadline: float) -> T:
        result = asyncio.wrap_future(job)
        try:
            await asyncio.wait({result}, timeout=max(0.01, deadline - time.monotonic()))
        finally:
            if not result.done():
                result.add_done_callback(_look)
        if not result.done():
            raise timed_out()
        return result.result()


def _look(result: asyncio.Future[Any]) -> None:
    """Retrieves the exception of a job without a caller; otherwise asyncio would log that it was never retrieved."""
    if not result.cancelled():
        result.exception()


def _on(loop: asyncio.AbstractEventLoop, call: Callable[..., None], *args: Any) -> None:
    """Schedules a call on the loop's thread, unless the loop is closed."""
    try:
        loop.call_soon_threadsafe(call, *args)
    except RuntimeError:
        pass
