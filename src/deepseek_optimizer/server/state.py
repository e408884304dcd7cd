"""What routes share: the engine, the tokenizer, the settings, and whether requests are still taken."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any, TypeVar

from ..chat.reasoning import thinks
from ..chat.template import ChatTemplate
from ..engine.grammar import GrammarCompiler
from ..engine.request import Request
from ..errors import EngineBusyError, RequestError
from .document_reader import DocumentReader
from .file_store import FileStore
from .json_body import BodyReader
from .preparation import Preparation
from .problems import ApiError, busy
from .protocol.sampling import answers_asked
from .settings import ServerSettings
from .threads import threaded
from .token_text import TokenTexts

T = TypeVar("T")


class ServerState:
    """
    Args:
        engine: an `AsyncEngine`.
    """

    def __init__(self, engine: Any, settings: ServerSettings) -> None:
        self.engine, self.settings = engine, settings
        self.bodies = BodyReader(settings)
        self.created = int(time.time())
        self.draining = False
        self.model_name: str = engine.model_name
        # Its own copy: a tokenizer's settings change while it encodes, and the engine's thread decodes meanwhile.
        self.tokenizer = copy.deepcopy(engine.tokenizer)
        self.template = ChatTemplate(self.tokenizer)
        self.texts = TokenTexts(self.tokenizer)
        # One thread: two would meet each other's settings. Texts wait for each other there, and not the event loop for them.
        self._tokenizing = ThreadPoolExecutor(1, "dso-tokenizer")
        self.grammars = GrammarCompiler(
            self.tokenizer, engine.vocab_size, stop_token_ids=engine.eos, seconds=settings.grammar_seconds
        )
        self._compiling = ThreadPoolExecutor(8, "dso-grammar")  # they wait for a process
        self.documents = Preparation(self._tokenizer_copy, engine.room, settings.most_files_bytes)
        self.files, self.reader = FileStore(settings, self.documents.forget), DocumentReader(settings)

    def check_taking(self) -> None:
        """
        Raises:
            ApiError: 503, the server is about to stop.
            EngineDeadError: it can't answer any more.
        """
        if self.draining:
            raise busy("the server is stopping", 5)
        self.engine.check_alive()

    def admit(self, body: Mapping[str, Any]) -> ExitStack:
        """Takes places in the engine's queue for the answers that a body asks for, before anything else is done for it.

        Returns: what gives them back.

        Raises:
            ApiError: 400, more answers than a request may have; 503, the server is about to stop.
            EngineBusyError: there are not so many places left.
            EngineDeadError: it can't answer any more.
        """
        self.check_taking()
        count, most = answers_asked(body), self.settings.most_answers
        if count > most:
            raise ApiError(400, f"n: {count} answers were asked for, and a request may have {most}", param="n")
        places = ExitStack()
        places.enter_context(self.engine.admit(count))
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

    async def tokenizing(self, work: Callable[[], T], deadline: float) -> T:
        """Runs what uses the tokenizer or the chat template.

        Raises:
            ApiError: 504, it was not done by the deadline.
        """
        return await threaded(self._tokenizing, work, deadline)

    async def compiling(self, work: Callable[[], T], deadline: float) -> T:
        """Runs what waits for a grammar; raises as `tokenizing` does."""
        return await threaded(self._compiling, work, deadline)

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

    async def _tokenizer_copy(self, deadline: float) -> Any:
        """Made on the thread that alone uses it."""
        return await self.tokenizing(lambda: copy.deepcopy(self.tokenizer), deadline)

    def thinks(self, tools: bool) -> bool:
        """Whether the model writes thoughts before its answer."""
        wanted = self.settings.reasoning
        return thinks(self.template.source(tools)) if wanted is None else wanted

    def warm_up(self) -> None:
        """Starts the processes for templates and grammars, which takes seconds; the first requests need not wait for them."""
        self._compiling.submit(self.grammars.json_object)
        try:
            self.template.variables()
        except (RequestError, EngineBusyError):  # a model without a template, or one that fails: for whoever chats to hear
            pass

    def close(self) -> None:
        """Ends what the state has started."""
        for threads in (self._tokenizing, self._compiling):
            threads.shutdown(wait=False, cancel_futures=True)
        self.template.close()
        self.reader.close()
        self.documents.close()
        self.grammars.close()
