"""State shared by all routes: the engine, the tokenizer, the settings, queues and uploaded files."""

from __future__ import annotations

import asyncio
import copy
import hashlib
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any, Literal, TypeVar

import psutil

from ..chat.reasoning import thinks
from ..engine.grammar.compiler import GrammarCompiler
from ..engine.grammar.source import GrammarSource
from ..engine.request import CompiledGrammar, Request
from ..errors import EngineBusyError, RequestError, WorkerLostError
from ..longdoc.recognized import PageReader
from ..versions import versions
from .adapters import AdapterLoading
from .documents.preparation import Preparation
from .http.caller import Caller
from .http.fair_queue import FairQueue
from .http.problems import ApiError, busy
from .http.queue_metrics import QueueCollector
from .http.sleep_metrics import SleepCollector, SleepState
from .pictures import Pictures
from .protocol.base import OLLAMA_TAG
from .protocol.sampling import requested_answers
from .settings import ServerSettings
from .shared import Shared
from .tokens.breakers import BreakerCache
from .tokens.fill_in import fill_in_tokens
from .tokens.prompt_size import PromptSize
from .tokens.token_text import TokenTexts
from .tokens.tokenizing import Lane, Tokenizing

T = TypeVar("T")
Asleep = Literal["weights", "kv_cache"]

_PACKAGE = "deepseek-optimizer"


class ServerState:
    """The state of one server, or of one model of a server with several.

    Args:
        engine: an `AsyncEngine`.
        settings: the server's.
        shared: what the server's models have in common; None: there is one model.
        ocr: reads scanned pages of uploaded files, unless `shared` is given; None: they are reported.

    Attributes:
        sleep_state: see `sleep`.
        until_used: whether the next request ends the sleep.
        used: time of the latest request, of `time.monotonic`.
    """

    def __init__(
        self, engine: Any, settings: ServerSettings, shared: Shared | None = None, ocr: PageReader | None = None
    ) -> None:
        self.engine, self.settings = engine, settings
        self.created = int(time.time())
        # Of the version and the model, on which answers with a seed depend.
        self.fingerprint = "b" + hashlib.sha256(f"{versions(_PACKAGE)} {engine.model_name}".encode()).hexdigest()[:10]
        self.sleep_state: SleepState = "awake"
        self.until_used = False
        self._asleep: set[Asleep] = set()
        self.used = time.monotonic()
        self._changing_sleep = asyncio.Lock()
        self.shared, self._alone = shared or Shared(settings, ocr), shared is None
        self.bodies, self.files, self.reader = self.shared.bodies, self.shared.files, self.shared.reader
        self.responses, self.batches = self.shared.responses, self.shared.batches
        self.model_name: str = engine.model_name
        self.generates: bool = engine.generates
        settings.embedding.check(engine.hidden_size)
        # A copy, since encoding changes a tokenizer's settings while the engine's thread may be decoding.
        self.tokenizer = copy.deepcopy(engine.tokenizer)
        self.texts = TokenTexts(self.tokenizer)
        self.fill_in = fill_in_tokens(self.tokenizer)
        self.breakers = BreakerCache(self.texts, engine.vocab_size)
        self.prompt_size = PromptSize(self.tokenizer, engine.context if engine.cache_window is None else None)
        max_per_client, max_jobs, workers = self.shared.max_per_client, self.shared.max_jobs, self.shared.workers
        encoder = engine.picture_encoder
        domains, seconds = settings.allowed_media_domains, settings.media_seconds
        self.pictures = None if encoder is None else Pictures(encoder, workers, max_per_client, max_jobs, domains, seconds)
        if self.pictures is not None:
            self.bodies.accept_pictures()
        self._tokenizing = Tokenizing(self.tokenizer, max_per_client, max_jobs, self.pictures is not None)
        self.template = self._tokenizing.short.template
        self.grammars = GrammarCompiler(
            self.tokenizer, engine.vocab_size, stop_token_ids=engine.eos, seconds=settings.grammar_seconds, workers=workers
        )
        # One job per client at a time, since a grammar may take seconds: the other processes are for other clients.
        self._compiling = FairQueue("grammars", workers, max_running=1, max_per_client=max_per_client, max_jobs=max_jobs)
        self._looking_up = FairQueue("schemas", 1, max_running=1, max_per_client=max_per_client, max_jobs=max_jobs)
        self.documents = Preparation(self._tokenizer_copy, engine.room, settings.max_file_bytes_total, max_per_client, max_jobs)
        self.shared.forget.append(self.documents.forget)
        self.vectors = FairQueue("vectors", 1, max_running=1, max_per_client=max_per_client, max_jobs=max_jobs)
        self.adapters = AdapterLoading(engine, settings)
        self.queues = [
            self.vectors, *self._tokenizing.queues, self._looking_up, self._compiling, *self.documents.queues,
            self.adapters.queue,
        ]  # fmt: skip
        self.queues += [] if self.pictures is None else self.pictures.queues
        if self._alone:
            self.queues += self.shared.queues
        engine.registry.register(QueueCollector(self.queues, engine.model_name))
        engine.registry.register(SleepCollector(lambda: self.sleep_state, engine.model_name))

    @property
    def draining(self) -> bool:
        """Whether the server is shutting down and refuses requests."""
        return self.shared.draining

    @draining.setter
    def draining(self, value: bool) -> None:
        self.shared.draining = value

    async def drain(self, seconds: float) -> bool:
        """See `AsyncEngine.drain`."""
        return bool(await self.engine.drain(seconds))

    @property
    def accepting(self) -> bool:
        """Whether `check_accepting` would accept a request that waits for this, if the engine is alive."""
        return not self.draining and (not self.sleeping or self.until_used)

    def check_accepting(self) -> None:
        """Checks that the server accepts requests, and wakes it if it sleeps until the next one.

        Raises:
            ApiError: 503, the server is shutting down or sleeps.
            EngineDeadError: the engine has stopped.
        """
        if self.draining:
            raise busy("the server is stopping", 5)
        self.used = time.monotonic()
        if self.sleeping and self.until_used:
            self._wake_up()
        if self.sleeping:
            raise busy("the server sleeps; POST /wake_up wakes it", 30)
        self.engine.check_alive()

    def admit(self, body: Mapping[str, Any], client: str) -> ExitStack:
        """Reserves places in the engine's queue for the answers that a body requests, before any other work is done for it.

        Args:
            body: of the request, not validated yet.
            client: key of the client.

        Returns: a context manager that releases the places.

        Raises:
            ApiError: 400, more answers than a request may have; 503, the server is shutting down.
            EngineBusyError: not enough places are free.
            EngineDeadError: the engine has stopped.
        """
        self.check_accepting()
        count, limit = requested_answers(body), self.settings.max_answers
        if count > limit:
            raise ApiError(400, f"n: the request asks for {count} answers, but may have at most {limit}", param="n")
        places = ExitStack()
        places.enter_context(self.engine.admit(count, client))
        return places

    def check_model(self, name: str | None) -> None:
        """Checks the name of a model by comparing it; it is never used as a file name.

        Raises:
            ApiError: 404, it is not the model that is served.
        """
        if name is None or self.model_name in (name, name.removesuffix(OLLAMA_TAG)) or self.adapter_named(name):
            return
        raise ApiError(404, "there is no such model; /v1/models lists the models", param="model", code="model_not_found")

    def adapter_named(self, name: str | None) -> str:
        """The LoRA adapter that a request's `model` names; "" if it names none."""
        names = () if name is None else (name, name.removesuffix(OLLAMA_TAG))
        loaded = [adapter.name for adapter in self.engine.adapters]
        return next((name for name in names if name in loaded), "")

    def deadline(self, arrived: float) -> float:
        """The deadline of a request; both times are of `time.monotonic`."""
        return arrived + self.settings.request_seconds

    async def tokenizing(self, work: Callable[[Lane], T], caller: Caller, size: int | None = None) -> T:
        """Runs work that uses a tokenizer or the chat template; see `Tokenizing.run`."""
        return await self._tokenizing.run(work, caller, size)

    async def compiling(self, make: Callable[[], GrammarSource | None], caller: Caller) -> CompiledGrammar | None:
        """Compiles a request's grammar. A grammar that was compiled before does not wait for a worker process.

        Args:
            make: returns the grammar's source, or None if there is none; may raise.
            caller: who sent the request.

        Raises:
            RequestError, WorkerLostError: see `GrammarCompiler.compile`.
            ApiError: see `FairQueue.run`.
        """

        def look_up() -> tuple[GrammarSource | None, CompiledGrammar | None]:
            source = make()
            return source, None if source is None else self.grammars.known(source)

        source, compiled = await self._looking_up.run(caller.key, look_up, caller.deadline)
        if source is None or compiled is not None:
            return compiled
        return await self._compiling.run(caller.key, lambda: self.grammars.compile(source), caller.deadline)

    def submit(self, requests: list[Request]) -> list[Any]:
        """Submits requests to the engine, all of them or none. Those without a maximum length of the answer get that of the
        settings.

        Returns: the answers of each request.

        Raises:
            RequestError, EngineDeadError: for the first request that the engine refuses.
        """
        answers: list[Any] = []
        try:
            for request in requests:
                answers.append(self.engine.submit(self._bounded(request)))
        except BaseException:
            for submitted in answers:
                submitted.cancel()
            raise
        return answers

    @property
    def max_answer_tokens(self) -> int:
        """Maximum number of tokens of an answer whose request gives none."""
        return min(self.settings.max_answer_tokens, self.engine.context)

    def _bounded(self, request: Request) -> Request:
        sampling = request.sampling
        if sampling.max_tokens is not None or request.embed:
            return request
        max_tokens = max(self.settings.max_answer_tokens, sampling.min_tokens)
        room = self.engine.room - (len(request.prompt) if self.engine.cache_window is None else 0)
        if max_tokens >= room:  # the engine ends the answer there
            return request
        return replace(request, sampling=replace(sampling, max_tokens=max_tokens))

    def fitted(self, request: Request) -> Request:
        """The request with a maximum length of the answer that the context has room for, as llama-server's n_predict."""
        max_tokens = request.sampling.max_tokens
        room = self.engine.room - len(request.prompt)
        if max_tokens is None or max_tokens <= room or room < 1 or self.engine.cache_window is not None:
            return request
        return replace(request, sampling=replace(request.sampling, max_tokens=room))

    async def _tokenizer_copy(self, caller: Caller) -> Any:
        """A copy of the tokenizer, made on the only thread that uses the original."""
        return await self.tokenizing(lambda lane: copy.deepcopy(lane.tokenizer), caller, 0)

    @property
    def sleeping(self) -> bool:
        """Whether requests are refused until `wake_up`, or until the next request with `until_used`."""
        return self.sleep_state != "awake"

    async def sleep(self, seconds: float, sleep_state: SleepState = "weights_offloaded", until_used: bool = False) -> int:
        """Refuses requests, lets those in flight end, and releases the memory of the cache and of mapped weights.

        Args:
            seconds: time after which requests in flight are cancelled.
            sleep_state: vLLM's name of the state, for metrics.
            until_used: the next request ends the sleep, instead of being refused.

        Returns: the bytes by which the memory of this process has decreased.

        Raises:
            ApiError: 503, the server is shutting down.
            EngineDeadError: the engine has stopped.
        """
        async with self._changing_sleep:
            if self.sleeping:
                return 0
            self.check_accepting()
            self.sleep_state, self.until_used, self._asleep = sleep_state, until_used, {"weights", "kv_cache"}
            process = psutil.Process()
            before: int = process.memory_info().rss
            try:
                await self.engine.sleep(seconds)
            except BaseException:
                self.sleep_state = "awake"
                raise
            return max(0, before - process.memory_info().rss)

    async def wake_up(self, parts: Sequence[Asleep] = ("weights", "kv_cache")) -> None:
        """Accepts requests again after `sleep`, once all parts are awake.

        Args:
            parts: to wake up.
        """
        async with self._changing_sleep:
            self._asleep.difference_update(parts)
            if self.sleeping and not self._asleep:
                self._wake_up()

    def _wake_up(self) -> None:
        self.engine.wake_up()
        self.sleep_state, self.until_used = "awake", False

    def thinks(self, tools: bool) -> bool:
        """Whether the model writes reasoning before its answer, in a chat with or without tools."""
        setting = self.settings.reasoning
        return thinks(self.template.source(tools)) if setting is None else setting

    @property
    def reranker(self) -> Literal["cosine", "yes-no"]:
        """How a model without a classification head scores pairs of texts; see `ServerSettings`."""
        setting = self.settings.reranker
        if setting != "auto":
            return setting
        judges = self.settings.embedding.score_tokens is not None or "rerank" in self.model_name.lower()
        return "yes-no" if self.generates and judges else "cosine"

    def warm_up(self) -> None:
        """Starts the processes for templates and grammars, which takes seconds, so that the first requests do not wait."""
        if not self.generates:
            return
        threading.Thread(target=self._warm_grammars, name="dso-warm-up", daemon=True).start()
        try:
            self.template.variables()
        except (RequestError, EngineBusyError, WorkerLostError):  # no template, or one that fails; the first chat reports it
            pass

    def _warm_grammars(self) -> None:
        try:
            self.grammars.json_object()
            self.grammars.start()
        except (RequestError, EngineBusyError, WorkerLostError):  # the first request with a grammar reports it
            pass

    def close(self) -> None:
        """Ends the threads and processes of the server."""
        for queue in (self._looking_up, self._compiling, self.vectors):
            queue.close()
        self._tokenizing.close()
        if self.pictures is not None:
            self.pictures.close()
        self.adapters.queue.close()
        if self.documents.forget in self.shared.forget:
            self.shared.forget.remove(self.documents.forget)
        self.documents.close()
        if self._alone:
            self.shared.close()
        self.grammars.close()
