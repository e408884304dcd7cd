"""`AsyncEngine`: the engine on a thread of its own, for an event loop with many clients.

Steps run one after the other on the thread; between two of them it takes in what the loop has sent: new requests,
cancellations. What a step brings goes to the loop in one call. A client that does not read costs one pending output: what
comes meanwhile is merged into it. If the thread dies, every request ends with an error and `alive` is False.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import threading
import time
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import cached_property
from types import TracebackType
from typing import TYPE_CHECKING, Any

from ..errors import CheckpointChangedError, EngineBusyError, EngineDeadError
from .core import EngineCore
from .request import Output, Request

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

_log = logging.getLogger(__name__)
_CLIENTS = 4  # whose requests are taken, if each has as many as it may
_NAP = 0.002  # seconds between steps while nobody can go on


class Answers:
    """The outputs of one request: `async for output in answers`. Made by `AsyncEngine.submit`."""

    def __init__(self, engine: AsyncEngine, request: Request) -> None:
        self._engine, self.request = engine, request
        self._pending: Output | None = None
        self._ready = asyncio.Event()
        self._ended = False  # the last output was handed out
        self._told: Callable[[], None] | None = None

    def __aiter__(self) -> AsyncIterator[Output]:
        return self

    async def __anext__(self) -> Output:
        if self._ended:
            raise StopAsyncIteration
        await self._ready.wait()
        output = self._pending
        assert output is not None
        self._pending = None
        self._ready.clear()
        self._ended = output.finish is not None
        return output

    def cancel(self) -> None:
        """Ends it within a step. Does nothing once it has ended."""
        self._engine.cancel(self.request.id)

    def when_ended(self, tell: Callable[[], None]) -> None:
        """Calls this once the engine is done with the request, whether or not anybody has read its last output."""
        if self._ended or (self._pending is not None and self._pending.finish is not None):
            tell()
        else:
            self._told = tell

    def put(self, output: Output) -> None:
        """From the loop's own thread."""
        self._pending = output if self._pending is None else merged(self._pending, output)
        self._ready.set()
        if output.finish is not None and self._told is not None:
            self._told()


def merged(first: Output, then: Output) -> Output:
    """Two outputs of a request as one."""
    logprobs = first.logprobs
    if then.logprobs is not None:
        logprobs = (first.logprobs or []) + then.logprobs
    return replace(then, token_ids=first.token_ids + then.token_ids, text=first.text + then.text, logprobs=logprobs)


class Admission:
    """Places in the queue, held while a request is prepared and answered: `with engine.admit(): ...`."""

    def __init__(self, engine: AsyncEngine, requests: int, client: str) -> None:
        self._engine, self._requests, self._client = engine, requests, client

    def __enter__(self) -> Admission:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.leave()

    def leave(self) -> None:
        """Gives the places back, once."""
        self._engine.left(self._requests, self._client)
        self._requests = 0


class AsyncEngine:
    """
    Args:
        core: nobody else may use it.
        model_name: what the API calls it.
        running: what is entered while steps run: the backend's arrangements with torch's threads.
        replaced_files: paths of the model's mapped files that lead to others by now.
    """

    def __init__(
        self, core: EngineCore, model_name: str, running: Any = nullcontext, replaced_files: Callable[[], list[str]] = list
    ) -> None:
        self.core, self.model_name, self._running, self._replaced_files = core, model_name, running, replaced_files
        self.tokenizer = core.tokenizer
        self.context, self.vocab_size, self.eos = core.facts.context, core.facts.vocab_size, core.facts.eos
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._inbox: deque[Request | str] = deque()  # new requests, and ids to cancel
        self._wake = threading.Condition()
        self._stopping = False
        self._dead: BaseException | None = None
        self._told: set[str] = set()  # replaced files
        self._changed: CheckpointChangedError | None = None  # found out by asking, before a step met it
        self._answers: dict[str, Answers] = {}
        self._ids = itertools.count(1)
        self._admitted = Counter[str]()  # places by client
        self._draining = False
        self._left: deque[float] = deque(maxlen=64)  # when places were given back
        self._empty: asyncio.Event | None = None

    @cached_property
    def registry(self) -> CollectorRegistry:
        """The engine's metrics. Needs `prometheus-client`."""
        from prometheus_client import CollectorRegistry

        from .prometheus import EngineCollector

        registry = CollectorRegistry()
        registry.register(EngineCollector(self))
        return registry

    # ---- on the loop

    @property
    def alive(self) -> bool:
        """Whether requests are answered."""
        return self._thread is not None and self._thread.is_alive() and self._failure() is None

    def tell_of_replaced_files(self) -> None:
        """Logs, once each, that the model goes on with files that have been replaced."""
        for file in self._replaced_files():
            if file not in self._told:
                self._told.add(file)
                _log.warning("%s was replaced or removed; the model goes on with what it loaded until it is restarted", file)

    def _failure(self) -> BaseException | None:
        """What keeps requests from being answered: what ended the thread, or would end it at its next step."""
        if self._dead is None and self._changed is None:
            try:
                self.core.runner.check_weights()
            except CheckpointChangedError as error:
                _log.error("the model cannot be used any more: %s", error)
                self._changed = error
        return self._dead or self._changed

    @property
    def admitted(self) -> int:
        """Places that are taken."""
        return self._admitted.total()

    @property
    def cache_window(self) -> int | None:
        """Tokens of a sequence that the cache keeps, see `EngineOptions`; None: sequences end with the context."""
        return None if self.core.sliding is None else self.core.sliding.window

    @property
    def room(self) -> int:
        """Tokens that prompt and text of a request may take together."""
        return self.core.room

    @property
    def capacity(self) -> int:
        """Places that a client may have. There are _CLIENTS times as many, so that who takes all of its own leaves some."""
        return self.core.options.batch_size_range[1] + self.core.options.max_waiting

    async def start(self) -> None:
        """Starts the thread."""
        self._loop = asyncio.get_running_loop()
        self._empty = asyncio.Event()
        self._thread = threading.Thread(target=self._run, name="dso-engine", daemon=True)
        self._thread.start()

    def admit(self, requests: int = 1, client: str = "") -> Admission:
        """Takes places in the queue. To be called before any work is done for the request.

        Args:
            client: whose request it is.

        Raises:
            EngineBusyError: there are not so many left, or the engine is draining.
            EngineDeadError: nothing is answered any more.
        """
        self.check_alive()
        own, all_ = self._admitted[client], self._admitted.total()
        if self._draining or own + requests > self.capacity or all_ + requests > _CLIENTS * self.capacity:
            raise EngineBusyError(own or all_, self._retry_after(requests))
        self._admitted[client] += requests
        return Admission(self, requests, client)

    def left(self, requests: int, client: str) -> None:
        """Places are free again."""
        self._admitted[client] -= requests
        if not self._admitted[client]:
            del self._admitted[client]
        self._left.extend([time.monotonic()] * requests)
        if not self._admitted and self._empty is not None:
            self._empty.set()

    def _retry_after(self, requests: int) -> float:
        """By the rate at which places became free lately."""
        if len(self._left) < 2:
            return 1.0
        seconds = max(time.monotonic() - self._left[0], 1e-3)
        return min(60.0, max(1.0, requests * seconds / len(self._left)))

    def submit(self, request: Request) -> Answers:
        """Queues a request.

        Raises:
            RequestError: it can never be served as it is.
            EngineDeadError: nothing is answered any more.
        """
        self.check_alive()
        self.core.check(request)
        # The engine's own ids: two clients may send the same one.
        request = replace(request, id=f"{request.id or 'request'}-{next(self._ids)}")
        answers = self._answers[request.id] = Answers(self, request)
        self._send(request)
        return answers

    def cancel(self, request_id: str) -> None:
        """Ends a request within a step, if it has not ended yet."""
        if request_id in self._answers:
            self._send(request_id)

    def check_alive(self) -> None:
        """
        Raises:
            EngineDeadError: nothing is answered any more. Its cause tells why, where there was an error: a
                CheckpointChangedError where a file that the model is mapped from was changed.
        """
        if not self.alive or self._stopping:
            raise EngineDeadError("the engine has stopped; restart the server") from self._failure()

    def _send(self, message: Request | str) -> None:
        with self._wake:
            self._inbox.append(message)
            self._wake.notify()

    def _deliver(self, outputs: list[Output]) -> None:
        for output in outputs:
            answers = self._answers.get(output.request_id)
            if answers is None:
                continue
            if output.finish is not None:
                del self._answers[output.request_id]
            answers.put(output)

    def _died(self, error: BaseException) -> None:
        self._dead = error
        for request_id in list(self._answers):
            self._deliver([Output(request_id, finish="error", error="the engine has stopped")])

    async def drain(self, seconds: float) -> bool:
        """Takes no new requests, and waits for those in it; those that are left after so many seconds are cancelled.

        Returns: whether all could end by themselves.
        """
        self._draining = True
        if not self._admitted or self._empty is None:
            return True
        self._empty.clear()
        try:
            await asyncio.wait_for(self._empty.wait(), seconds)
            return True
        except (TimeoutError, asyncio.TimeoutError):
            for request_id in list(self._answers):
                self.cancel(request_id)
            return False

    async def close(self) -> None:
        """Ends the thread; requests in it end as cancelled."""
        for request_id in list(self._answers):
            self.cancel(request_id)
        with self._wake:
            self._stopping = True
            self._wake.notify()
        if self._thread is not None:
            await asyncio.to_thread(self._thread.join)
            await asyncio.sleep(0)  # what it has sent last is delivered
        self._deliver([Output(request_id, finish="cancelled") for request_id in list(self._answers)])

    # ---- on the thread

    def _run(self) -> None:
        assert self._loop is not None
        try:
            while True:
                self._take_in()
                if self._stopping and self.core.idle:
                    return
                with self._running():
                    outputs = self.core.step()
                if outputs:
                    self._loop.call_soon_threadsafe(self._deliver, outputs)
                elif self.core.nobody_ran:
                    time.sleep(_NAP)
        except BaseException as error:
            if isinstance(error, CheckpointChangedError):
                _log.error("the model cannot be used any more: %s", error)
            else:
                _log.exception("the engine's thread has died")
            if not self._loop.is_closed():
                self._loop.call_soon_threadsafe(self._died, error)

    def _take_in(self) -> None:
        with self._wake:
            while not self._inbox and self.core.idle and not self._stopping:
                self._wake.wait()
            messages, self._inbox = self._inbox, deque()
        for message in messages:
            if isinstance(message, str):
                self.core.cancel(message)
            else:
                self._add(message)

    def _add(self, request: Request) -> None:
        assert self._loop is not None
        try:
            self.core.add(request)
        except Exception as error:  # its grammar could not be started, say: the others go on
            _log.exception("request %s could not begin", request.id)
            failed = Output(request.id, finish="error", error=f"the request could not begin: {type(error).__name__}")
            self._loop.call_soon_threadsafe(self._deliver, [failed])
