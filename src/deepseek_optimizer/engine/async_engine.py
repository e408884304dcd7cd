"""`AsyncEngine`: the engine on its own thread, for an event loop with many clients.

The thread runs steps one after another and, between steps, handles the new requests and cancellations that the loop has sent.
The outputs of a step are passed to the loop in one call. A client that does not read holds one pending output, into which
later ones are merged. If the thread dies, all requests end with an error and `alive` becomes False.
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
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol

from ..errors import CheckpointChangedError, EngineBusyError, EngineDeadError, RankLostError
from .adapters import Adapter, adapters_of
from .core import EngineCore
from .encoder_core import Classifier, EncoderCore
from .metrics import EndedRequest, EngineMetrics
from .picture_pace import PicturePace
from .request import Finish, Output, Request
from .running import RequestProgress

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

_log = logging.getLogger(__name__)


class Observer(Protocol):
    """Observes the requests of an engine, such as for traces."""

    def submitted(self, request: Request) -> None:
        """Called when a request is submitted, in the caller's context."""

    def ended(self, ended: EndedRequest, finish: Finish) -> None:
        """Called on the engine's thread when a request has ended."""


class Weights(Protocol):
    """The weights of a model, whose memory is released while the engine sleeps."""

    def release_pages(self) -> None:
        """Releases the memory of weights that are mapped from a file; they are read again when they are used."""

    def read_ahead(self) -> None:
        """Begins to read mapped weights."""


_CLIENTS = 4  # the queue holds this many times the maximum number of requests of one client
_NAP = 0.002  # seconds between steps while no request can continue


class Answers:
    """The outputs of one request: `async for output in answers`. Created by `AsyncEngine.submit`."""

    def __init__(self, engine: AsyncEngine, request: Request) -> None:
        self._engine, self.request = engine, request
        self._pending: Output | None = None
        self._ready = asyncio.Event()
        self._ended = False  # the last output has been returned
        self._on_end: Callable[[], None] | None = None

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
        """Cancels the request: it ends within a step. Does nothing if it has ended already."""
        self._engine.cancel(self.request.id)

    def when_ended(self, callback: Callable[[], None]) -> None:
        """Calls `callback` once the engine has finished the request, whether or not its last output has been read."""
        if self._ended or (self._pending is not None and self._pending.finish is not None):
            callback()
        else:
            self._on_end = callback

    def put(self, output: Output) -> None:
        """Adds an output. To be called on the loop's thread."""
        self._pending = output if self._pending is None else merged(self._pending, output)
        self._ready.set()
        if output.finish is not None and self._on_end is not None:
            self._on_end()


def merged(first: Output, then: Output) -> Output:
    """Merges two consecutive outputs of a request into one."""
    logprobs = first.logprobs
    if then.logprobs is not None:
        logprobs = (first.logprobs or []) + then.logprobs
    return replace(
        then,
        token_ids=first.token_ids + then.token_ids,
        text=first.text + then.text,
        logprobs=logprobs,
        prompt_logprobs=then.prompt_logprobs if first.prompt_logprobs is None else first.prompt_logprobs,
        progress=first.progress + then.progress,
    )


class Admission:
    """Places in the queue, held while a request is prepared and processed: `with engine.admit(): ...`."""

    def __init__(self, engine: AsyncEngine, requests: int, client: str) -> None:
        self._engine, self._requests, self._client = engine, requests, client

    def __enter__(self) -> Admission:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.leave()

    def leave(self) -> None:
        """Releases the places. Further calls have no effect."""
        self._engine.left(self._requests, self._client)
        self._requests = 0


class AsyncEngine:
    """Runs an engine core on its own thread; all public methods are for the event loop's thread.

    Args:
        core: an engine core that nothing else uses; that of an encoder embeds and classifies texts.
        model_name: name of the model in the API.
        running: returns a context manager that is active during each step, such as the backend's thread settings.
        replaced_files: returns the paths of the model's mapped files that have been replaced or removed since.
        weights: of the model, for `sleep`; None: they are not released.
        picture_encoder: makes prompts with pictures for this engine; None: the model reads text only.
    """

    def __init__(
        self,
        core: EngineCore | EncoderCore,
        model_name: str,
        running: Any = nullcontext,
        replaced_files: Callable[[], list[str]] = list,
        weights: Weights | None = None,
        picture_encoder: Any = None,
    ) -> None:
        self.picture_encoder = picture_encoder
        self._pace: PicturePace | None = None if picture_encoder is None else picture_encoder.pace
        self.core, self.model_name, self._running, self._replaced_files = core, model_name, running, replaced_files
        self.tokenizer = core.tokenizer
        self.context, self.vocab_size, self.eos = core.facts.context, core.facts.vocab_size, core.facts.eos
        self.hidden_size = core.facts.hidden_size
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        # New requests, ids to cancel, and jobs, with the time of each by the core's clock.
        self._inbox: deque[tuple[float, Request | str | Callable[[], None]]] = deque()
        self._jobs: deque[Callable[[], None]] = deque()  # to run on the thread when no request is in the core
        self._weights = weights
        self._observer: Observer | None = None
        self._wake = threading.Condition()
        self._stopping = False
        self._dead: BaseException | None = None
        self._logged: set[str] = set()  # replaced files
        self._changed: CheckpointChangedError | RankLostError | None = None  # detected by a check before a step failed
        self._answers: dict[str, Answers] = {}
        self._adapters: dict[str, Adapter] = {}  # acquired for requests that the thread has not received yet
        self._ids = itertools.count(1)
        self._admitted = Counter[str]()  # places by client
        self.refused = 0  # requests for which no place was free
        self._draining = False
        self._left: deque[float] = deque(maxlen=64)  # times at which places were released
        self._empty: asyncio.Event | None = None

    @cached_property
    def registry(self) -> CollectorRegistry:
        """The engine's metrics. Needs `prometheus-client`."""
        from prometheus_client import CollectorRegistry

        from .prometheus import EngineCollector

        registry = CollectorRegistry()
        registry.register(EngineCollector(self))
        return registry

    def observe(self, observer: Observer) -> None:
        """Has `observer` called for every request. To be called before `start`."""
        self._observer, self.core.on_ended = observer, observer.ended

    # ---- on the loop

    @property
    def alive(self) -> bool:
        """Whether the engine serves requests."""
        return self._thread is not None and self._thread.is_alive() and self._failure() is None

    def log_replaced_files(self) -> None:
        """Logs a warning, once per file, for files of the model that have been replaced or removed."""
        for file in self._replaced_files():
            if file not in self._logged:
                self._logged.add(file)
                _log.warning("%s was replaced or removed; the model uses the loaded version until it is restarted", file)

    def _failure(self) -> BaseException | None:
        """Returns the error that ended the thread, or would end it at its next step."""
        if self._dead is None and self._changed is None:
            try:
                self.core.runner.check_weights()
            except (CheckpointChangedError, RankLostError) as error:
                _log.error("the model can no longer be used: %s", error)
                self._changed = error
        return self._dead or self._changed

    @property
    def admitted(self) -> int:
        """Number of places in the queue that are taken."""
        return self._admitted.total()

    @property
    def load(self) -> tuple[int, int]:
        """Number of requests in the running batch, and of requests that wait for it."""
        return self.core.load

    @property
    def metrics(self) -> EngineMetrics:
        """Counts since the start. A step in progress may or may not be counted."""
        return self.core.metrics

    @property
    def drafted(self) -> tuple[int, int, int]:
        """Number of draft tokens verified, of those accepted, and of drafts, by speculative decoding."""
        drafting = self.core.drafting if isinstance(self.core, EngineCore) else None
        return (0, 0, 0) if drafting is None else (drafting.proposed, drafting.accepted, drafting.drafts)

    def running_requests(self) -> list[RequestProgress]:
        """The requests in the running batch. An encoder has none between its steps."""
        running = list(self.core.scheduler.running) if isinstance(self.core, EngineCore) else []
        return [RequestProgress(r.number, len(r.request.prompt), r.generated, r.max_tokens) for r in running]

    @property
    def cache_window(self) -> int | None:
        """Maximum number of tokens of a sequence in the cache, see `EngineOptions`; None: sequences end with the context."""
        return None if self.core.sliding is None else self.core.sliding.window

    @property
    def generates(self) -> bool:
        """Whether the model generates text; an encoder only embeds and classifies it."""
        return isinstance(self.core, EngineCore)

    @property
    def classifier(self) -> Classifier | None:
        """The model's classification head; None: it has none."""
        return self.core.classifier if isinstance(self.core, EncoderCore) else None

    @property
    def room(self) -> int:
        """Maximum number of tokens of a request, prompt and text together."""
        return self.core.room

    @property
    def max_running(self) -> int:
        """Maximum number of requests that run at once."""
        return self.core.options.batch_size_range[1]

    @property
    def capacity(self) -> int:
        """Maximum number of places per client. The queue has _CLIENTS times as many, so that one client cannot fill it."""
        return self.max_running + self.core.options.max_waiting

    async def start(self) -> None:
        """Starts the thread."""
        self._loop = asyncio.get_running_loop()
        self._empty = asyncio.Event()
        self._thread = threading.Thread(target=self._run, name="dso-engine", daemon=True)
        self._thread.start()

    def admit(self, requests: int = 1, client: str = "") -> Admission:
        """Takes places in the queue. To be called before any work is done for the request.

        Args:
            requests: number of places.
            client: identifier of the client that sent the request.

        Raises:
            EngineBusyError: fewer places are free, or the engine is draining.
            EngineDeadError: the engine has stopped.
        """
        self.check_alive()
        own, all_ = self._admitted[client], self._admitted.total()
        if self._draining or own + requests > self.capacity or all_ + requests > _CLIENTS * self.capacity:
            self.refused += requests
            raise EngineBusyError(own or all_, self._retry_after(requests))
        self._admitted[client] += requests
        self.core.metrics.answers.add(requests)
        return Admission(self, requests, client)

    def left(self, requests: int, client: str) -> None:
        """Releases places in the queue."""
        self._admitted[client] -= requests
        if not self._admitted[client]:
            del self._admitted[client]
        self._left.extend([time.monotonic()] * requests)
        if not self._admitted and self._empty is not None:
            self._empty.set()

    def _retry_after(self, requests: int) -> float:
        """Returns an estimate in seconds, from the rate at which places were released recently."""
        if len(self._left) < 2:
            return 1.0
        seconds = max(time.monotonic() - self._left[0], 1e-3)
        return min(60.0, max(1.0, requests * seconds / len(self._left)))

    @property
    def adapters(self) -> list[Adapter]:
        """The LoRA adapters that requests can choose, in the order in which they were loaded."""
        return [] if self.core.adapters is None else self.core.adapters.loaded

    def load_adapter(self, name: str, path: str | Path, replace: bool = False) -> None:
        """Loads a LoRA adapter while the engine runs. It blocks while it reads files: call it on any thread but the loop's.

        Args and errors: see `Adapters.load`.
        """
        adapters_of(self.core).load(name, path, replace)

    def unload_adapter(self, name: str) -> None:
        """Unloads a LoRA adapter; requests in the engine that use it continue. Raises RequestError if there is none of this
        name."""
        adapters_of(self.core).unload(name)

    def submit(self, request: Request) -> Answers:
        """Queues a request and returns its stream of outputs.

        Raises:
            RequestError: the request can never be served.
            EngineDeadError: the engine has stopped.
        """
        self.check_alive()
        self.core.check(request)
        # The id is made unique, since two clients may send the same one.
        request = replace(request, id=f"{request.id or 'request'}-{next(self._ids)}")
        if request.adapter:
            self._adapters[request.id] = adapters_of(self.core).acquire(request.adapter)
        if self._observer is not None:
            self._observer.submitted(request)
        answers = self._answers[request.id] = Answers(self, request)
        self._send(request)
        return answers

    def cancel(self, request_id: str) -> None:
        """Cancels a request: it ends within a step, unless it has ended already."""
        if request_id in self._answers:
            self._send(request_id)

    def check_alive(self) -> None:
        """Checks that the engine serves requests.

        Raises:
            EngineDeadError: the engine has stopped. If an error is the reason, it is the exception's cause, such as a
                CheckpointChangedError if a mapped file of the model was modified.
        """
        if not self.alive or self._stopping:
            raise EngineDeadError("the engine has stopped; restart the server") from self._failure()

    def _send(self, message: Request | str | Callable[[], None]) -> None:
        with self._wake:
            self._inbox.append((self.core.clock(), message))
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
        """Stops admitting requests and waits for the admitted ones to end.

        Args:
            seconds: time after which the remaining requests are cancelled.

        Returns: whether all requests ended without being cancelled.
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

    async def sleep(self, seconds: float) -> None:
        """Stops admitting requests, waits for the admitted ones as `drain` does, and releases the memory of the cache and of
        mapped weights. What was released is allocated or read again after `wake_up`.

        Args:
            seconds: time after which the remaining requests are cancelled.
        """
        self.check_alive()
        await self.drain(seconds)
        loop = asyncio.get_running_loop()
        done = asyncio.Event()

        def release() -> None:
            self.core.release_memory()
            if self._weights is not None:
                self._weights.release_pages()
            loop.call_soon_threadsafe(done.set)

        self._send(release)
        await done.wait()

    def wake_up(self) -> None:
        """Admits requests again after `sleep`, and begins to read the weights."""
        self._draining = False
        if self._weights is not None:
            self._weights.read_ahead()

    async def close(self) -> None:
        """Stops the thread; unfinished requests end as cancelled."""
        for request_id in list(self._answers):
            self.cancel(request_id)
        with self._wake:
            self._stopping = True
            self._wake.notify()
        if self._thread is not None:
            await asyncio.to_thread(self._thread.join)
            await asyncio.sleep(0)  # delivers the last outputs it sent
            if isinstance(self.core, EngineCore):
                await asyncio.to_thread(self.core.scheduler.close)
        self._deliver([Output(request_id, finish="cancelled") for request_id in list(self._answers)])

    # ---- on the thread

    def _run(self) -> None:
        assert self._loop is not None
        try:
            while True:
                self._process_inbox()
                while self._jobs and self.core.idle:
                    self._jobs.popleft()()
                if self._stopping and self.core.idle:
                    return
                with self._running():
                    outputs = self.core.step()
                if self._pace is not None and isinstance(self.core, EngineCore):
                    self._pace.stepped(self.core)
                if outputs:
                    self._loop.call_soon_threadsafe(self._deliver, outputs)
                elif self.core.stalled:
                    time.sleep(_NAP)
        except BaseException as error:
            if isinstance(error, (CheckpointChangedError, RankLostError)):
                _log.error("the model can no longer be used: %s", error)
            else:
                _log.exception("the engine's thread has died")
            if not self._loop.is_closed():
                self._loop.call_soon_threadsafe(self._died, error)
        finally:
            if self._pace is not None:
                self._pace.stopped()

    def _process_inbox(self) -> None:
        """Waits while there is nothing to do; then handles new requests and cancellations."""
        with self._wake:
            while not self._inbox and not self._jobs and self.core.idle and not self._stopping:
                self._wake.wait()
            messages, self._inbox = self._inbox, deque()
        for arrived, message in messages:
            if isinstance(message, str):
                self.core.cancel(message)
            elif callable(message):
                self._jobs.append(message)
            else:
                self._add(message, arrived)

    def _add(self, request: Request, arrived: float) -> None:
        assert self._loop is not None
        adapter = self._adapters.pop(request.id, None)
        try:
            self.core.add(request, adapter, arrived)
        except Exception as error:  # such as a grammar that fails to start; other requests are not affected
            if adapter is not None:
                adapters_of(self.core).release(adapter)
            _log.exception("request %s could not be started", request.id)
            failed = Output(request.id, finish="error", error=f"the request could not be started: {type(error).__name__}")
            self._loop.call_soon_threadsafe(self._deliver, [failed])
