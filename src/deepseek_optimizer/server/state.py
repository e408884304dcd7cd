"""What routes share: the engine, the tokenizer, the settings, and whether requests are still taken."""

from __future__ import annotations

import copy
import os
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any, TypeVar

from ..chat.reasoning import thinks
from ..engine.grammar.compiler import GrammarCompiler
from ..engine.grammar.source import GrammarSource
from ..engine.request import CompiledGrammar, Request
from ..errors import EngineBusyError, RequestError, WorkerLostError
from .documents.file_store import FileStore
from .documents.preparation import Preparation
from .documents.reader import DocumentReader
from .http.caller import Caller
from .http.fair_queue import FairQueue
from .http.json_body import BodyReader
from .http.problems import ApiError, busy
from .http.queue_metrics import QueueCollector
from .protocol.sampling import answers_asked
from .settings import ServerSettings
from .tokens.prompt_size import PromptSize
from .tokens.token_text import TokenTexts
from .tokens.tokenising import Lane, Tokenising

T = TypeVar("T")

_CLIENTS = 4  # whose jobs a queue takes, if each has as many as it may
_WORKERS = (2, 4)  # processes of a kind, at least and at most


class ServerState:
    """
    Args:
        engine: an `AsyncEngine`.
    """

    def __init__(self, engine: Any, settings: ServerSettings) -> None:
        self.engine, self.settings = engine, settings
        self.created = int(time.time())
        self.draining = False
        self.model_name: str = engine.model_name
        # Its own copy: a tokenizer's settings change while it encodes, and the engine's thread decodes meanwhile.
        self.tokenizer = copy.deepcopy(engine.tokenizer)
        self.texts = TokenTexts(self.tokenizer)
        self.prompt_size = PromptSize(self.tokenizer, engine.context if engine.cache_window is None else None)
        max_per_client, most = settings.max_jobs_per_client, _CLIENTS * settings.max_jobs_per_client
        self.bodies = BodyReader(settings, max_per_client, most)
        self._tokenising = Tokenising(self.tokenizer, max_per_client, most)
        self.template = self._tokenising.short.template
        workers = min(max(_WORKERS[0], (os.cpu_count() or 1) // 2), _WORKERS[1])
        self.grammars = GrammarCompiler(
            self.tokenizer, engine.vocab_size, stop_token_ids=engine.eos, seconds=settings.grammar_seconds, workers=workers
        )
        # One of a client's at a time: what may take seconds leaves the other processes to the others.
        self._compiling = FairQueue("grammars", workers, max_running=1, max_per_client=max_per_client, most=most)
        self._looking_up = FairQueue("schemas", 1, max_running=1, max_per_client=max_per_client, most=most)
        self.documents = Preparation(self._tokenizer_copy, engine.room, settings.max_file_bytes_total, max_per_client, most)
        self.files = FileStore(settings, self.documents.forget)
        self.reader = DocumentReader(settings, workers, max_per_client, most)
        self.queues = [
            self.bodies.queue, *self._tokenising.queues, self._looking_up, self._compiling, self.reader.queue,
            *self.documents.queues,
        ]  # fmt: skip
        engine.registry.register(QueueCollector(self.queues, engine.model_name))

    def check_taking(self) -> None:
        """
        Raises:
            ApiError: 503, the server is about to stop.
            EngineDeadError: it can't answer any more.
        """
        if self.draining:
            raise busy("the server is stopping", 5)
        self.engine.check_alive()

    def admit(self, body: Mapping[str, Any], client: str) -> ExitStack:
        """Takes places in the engine's queue for the answers that a body asks for, before anything else is done for it.

        Args:
            client: whose they are.

        Returns: what gives them back.

        Raises:
            ApiError: 400, more answers than a request may have; 503, the server is about to stop.
            EngineBusyError: there are not so many places left.
            EngineDeadError: it can't answer any more.
        """
        self.check_taking()
        count, most = answers_asked(body), self.settings.max_answers
        if count > most:
            raise ApiError(400, f"n: {count} answers were asked for, and a request may have {most}", param="n")
        places = ExitStack()
        places.enter_context(self.engine.admit(count, client))
        return places

    def check_model(self, name: str | None) -> None:
        """
        Raises:
            ApiError: 404, `name` is not the model that is served. It is only ever compared: no file of that name is looked at.
        """
        if name is not None and name != self.model_name:
            raise ApiError(404, "there is no such model; /v1/models lists what there is", param="model", code="model_not_found")

    def deadline(self, arrived: float) -> float:
        """Of a request that arrived then, both of `time.monotonic`."""
        return arrived + self.settings.request_seconds

    async def tokenizing(self, work: Callable[[Lane], T], caller: Caller, size: int | None = None) -> T:
        """Runs what uses a tokenizer or the chat template; see `Tokenising.run`."""
        return await self._tokenising.run(work, caller, size)

    async def compiling(self, make: Callable[[], GrammarSource | None], caller: Caller) -> CompiledGrammar | None:
        """The grammar of what a request asks for. What is known already waits for no process.

        Args:
            make: makes its source, or raises.

        Raises:
            RequestError, WorkerLostError: as of `GrammarCompiler.compile`.
            ApiError: as of `FairQueue.run`.
        """

        def look_up() -> tuple[GrammarSource | None, CompiledGrammar | None]:
            source = make()
            return source, None if source is None else self.grammars.known(source)

        source, found = await self._looking_up.run(caller.key, look_up, caller.deadline)
        if source is None or found is not None:
            return found
        return await self._compiling.run(caller.key, lambda: self.grammars.compile(source), caller.deadline)

    def submit(self, requests: list[Request]) -> list[Any]:
        """The answers of each, all of them or none.

        Raises:
            RequestError, EngineDeadError: of the first that is not taken.
        """
        answers: list[Any] = []
        try:
            for request in requests:
                answers.append(self.engine.submit(request))
        except BaseException:
            for taken in answers:
                taken.cancel()
            raise
        return answers

    async def _tokenizer_copy(self, caller: Caller) -> Any:
        """Made on the thread that alone uses it."""
        return await self.tokenizing(lambda lane: copy.deepcopy(lane.tokenizer), caller, 0)

    def thinks(self, tools: bool) -> bool:
        """Whether the model writes thoughts before its answer."""
        wanted = self.settings.reasoning
        return thinks(self.template.source(tools)) if wanted is None else wanted

    def warm_up(self) -> None:
        """Starts the processes for templates and grammars, which takes seconds; the first requests need not wait for them."""
        threading.Thread(target=self._warm_grammars, name="dso-warm-up", daemon=True).start()
        try:
            self.template.variables()
        except (RequestError, EngineBusyError, WorkerLostError):  # no template, or one that fails: for whoever chats to hear
            pass

    def _warm_grammars(self) -> None:
        try:
            self.grammars.json_object()
            self.grammars.start()
        except (RequestError, EngineBusyError, WorkerLostError):  # for whoever asks for one to hear
            pass

    def close(self) -> None:
        """Ends what the state has started."""
        for queue in (self._looking_up, self._compiling, self.bodies.queue):
            queue.close()
        self._tokenising.close()
        self.reader.close()
        self.documents.close()
        self.grammars.close()
