"""The models of a server with several: a request waits until the model it names is loaded; one at a time is loaded.

Memory is a model's weights and the maximum of its cache. If the next model does not fit, the least recently used ones are
unloaded: idle ones first, and a busy one when the requests that use it have ended. Requests that arrive for a model that is
being unloaded wait until it is loaded again, so that a busy model does not keep others out forever.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import time
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from typing import Any

from ...errors import ConfigError, DeepSeekOptimizerError
from ...longdoc.recognized import PageReader
from ...system.memory import mb
from ..http.problems import ApiError, busy
from ..protocol.base import OLLAMA_TAG
from ..settings import ServerSettings
from ..shared import Shared
from .model_list import ModelFile
from .pooled_model import LoadedModel, PooledModel

_log = logging.getLogger(__name__)
_RETRY = 30.0  # seconds after a failed load in which requests do not try again
_MAX_WAITING = (64, 256)  # requests that wait for models: of one client, and in all
_LIST_SECONDS = 1.0  # the list of files is at most this old when a name is not found

Open = Callable[[ModelFile, Shared], LoadedModel]


class ModelPool:
    """All methods are for the event loop's thread.

    Args:
        settings: the server's.
        list_files: returns the models by name; called on a thread, again when a name is unknown.
        open_model: loads a model; called on a thread. Its engine is not started yet.
        memory: maximum memory of all loaded models, in bytes.
        cache: maximum memory of a model's cache, in bytes.
        pinned: names of models that are loaded at the start and stay loaded.
        default: name of the model for requests that name none; None: the only one, or the last one used.
        load_seconds: maximum time that a request waits for its model.
        ocr: reads scanned pages of uploaded files; None: they are reported.

    Raises:
        ConfigError: a pinned model or the default does not exist.
    """

    def __init__(
        self,
        settings: ServerSettings,
        list_files: Callable[[], dict[str, ModelFile]],
        open_model: Open,
        *,
        memory: int,
        cache: int = 0,
        pinned: Iterable[str] = (),
        default: str | None = None,
        load_seconds: float = 120.0,
        ocr: PageReader | None = None,
    ) -> None:
        self.settings, self.shared, self.created = settings, Shared(settings, ocr), int(time.time())
        self.shared.bodies.accept_pictures()  # a body is read before its model is loaded
        self.files, self.reader = self.shared.files, self.shared.reader
        self.responses, self.batches = self.shared.responses, self.shared.batches
        self._list_files, self._open = list_files, open_model
        self.memory, self.cache, self.default, self.load_seconds = memory, cache, default, load_seconds
        pinned = tuple(pinned)
        self.models = {name: PooledModel(file, name in pinned) for name, file in list_files().items()}
        self.loads = self.unloads = 0
        for name in (*pinned, *([] if default is None else [default])):
            if name not in self.models:
                raise ConfigError(f"there is no model {name!r}; the models are {', '.join(sorted(self.models)) or 'none'}")
        self._listed = time.monotonic()
        self._waiting = Counter[str]()  # requests that wait for a model, by client
        self._wanted: deque[PooledModel] = deque()
        self._wake = asyncio.Event()
        self._loader: asyncio.Task[None] | None = None

    # ---- the server

    @property
    def draining(self) -> bool:
        """Whether the server is shutting down and refuses requests."""
        return self.shared.draining

    @draining.setter
    def draining(self, value: bool) -> None:
        self.shared.draining = value

    @property
    def loaded(self) -> list[PooledModel]:
        return [model for model in self.models.values() if model.loaded is not None]

    @property
    def engines(self) -> dict[str, Any]:
        """The engines of the loaded models, by their names."""
        return {model.file.name: model.loaded.state.engine for model in self.loaded if model.loaded is not None}

    @property
    def alive(self) -> bool:
        """Whether no engine of a loaded model has stopped."""
        return all(engine.alive for engine in self.engines.values())

    @property
    def waiting(self) -> int:
        """Number of requests that wait until a model is loaded."""
        return self._waiting.total()

    def start(self) -> None:
        """Starts to load models: first the pinned ones."""
        self._loader = asyncio.ensure_future(self._run())
        for model in self.models.values():
            if model.pinned:
                self.load(model)

    async def drain(self, seconds: float) -> bool:
        """Stops admitting requests and waits for those in flight, as `AsyncEngine.drain` does for one model."""
        self.draining = True
        for model in self.models.values():
            model.settle(model.error)
        return all(await asyncio.gather(*(engine.drain(seconds) for engine in self.engines.values())))

    async def close(self) -> None:
        """Unloads all models; unfinished requests end as cancelled."""
        self.draining = True
        if self._loader is not None:
            self._loader.cancel()
            await asyncio.gather(self._loader, return_exceptions=True)
        for model in self.models.values():
            if model.leaving is not None and model.users:
                model.leaving.cancel()
            elif model.leaving is not None:
                await model.leaving
            await self._end(model)
        await self.shared.responses.finish()
        self.shared.close()

    def check_accepting(self) -> None:
        """Raises ApiError 503 if the server is shutting down."""
        if self.draining:
            raise busy("the server is stopping", 5)

    def deadline(self, arrived: float) -> float:
        """The deadline of a request; both times are of `time.monotonic`."""
        return arrived + self.settings.request_seconds

    # ---- models by name

    async def refresh(self, older: float = 0.0) -> None:
        """Lists the files again if the list is older than this number of seconds. Models that are gone disappear once they are
        not loaded."""
        if time.monotonic() - self._listed < older:
            return
        self._listed = time.monotonic()
        try:
            files = await asyncio.to_thread(self._list_files)
        except ConfigError as error:
            _log.warning("the list of models is not updated: %s", error)
            return
        for name, file in files.items():
            if name not in self.models:
                self.models[name] = PooledModel(file, False)
            elif self.models[name].status in ("unloaded", "failed"):
                self.models[name].file = file
        for name in [n for n, m in self.models.items() if n not in files and m.status in ("unloaded", "failed")]:
            del self.models[name]

    async def find(self, name: str | None) -> PooledModel:
        """The model that a request names, by comparison with the list; a loaded model may have further names (adapters).

        Raises:
            ApiError: 404, there is none; 400, the request names none and there are several.
        """
        if name is None:
            return self._default()
        if name not in self.models and (own := self._by_other_name(name)) is not None:
            return own
        if name not in self.models:
            await self.refresh(_LIST_SECONDS)
        if name not in self.models:
            name = name.removesuffix(OLLAMA_TAG)
        if name not in self.models:
            raise ApiError(404, "there is no such model; /v1/models lists the models", param="model", code="model_not_found")
        return self.models[name]

    @property
    def has_default(self) -> bool:
        """Whether the model for requests that name none is loaded."""
        try:
            return self._default().ready
        except ApiError:
            return False

    def _default(self) -> PooledModel:
        if self.default is not None and self.default in self.models:
            return self.models[self.default]
        if len(self.models) == 1:
            return next(iter(self.models.values()))
        if self.loaded:
            return max(self.loaded, key=lambda model: (model.users > 0, model.used))
        raise ApiError(400, "model: is required, as there are several; /v1/models lists them", param="model")

    def _by_other_name(self, name: str) -> PooledModel | None:
        for model in self.loaded:
            assert model.loaded is not None
            try:
                model.loaded.state.check_model(name)
            except ApiError:
                continue
            return model
        return None

    @asynccontextmanager
    async def using(self, model: PooledModel, client: str, size: int, deadline: float) -> AsyncIterator[LoadedModel]:
        """Waits until a model is loaded, which then stays loaded until the end of the context.

        Args:
            model: the model.
            client: key of the client.
            size: bytes of the request's body, which is held meanwhile.
            deadline: of the request, a time of `time.monotonic`.

        Raises:
            ApiError: 429 or 503, too many requests wait; 503, the model cannot be loaded, or not in time.
            EngineDeadError: its engine has stopped.
        """
        if model.ready:
            model.enter()
        else:
            with self.shared.bodies.holding(client, size):
                await self._enter_when_loaded(model, client, deadline)
        assert model.loaded is not None
        try:
            yield model.loaded
        finally:
            model.leave()

    async def _enter_when_loaded(self, model: PooledModel, client: str, deadline: float) -> None:
        if self._waiting[client] >= _MAX_WAITING[0]:
            raise ApiError(
                429, f"{self._waiting[client]} of your requests wait for models, the maximum; retry when some are done",
                code="queue_full", headers={"Retry-After": "5"},
            )  # fmt: skip
        if self._waiting.total() >= _MAX_WAITING[1]:
            raise busy("the maximum number of requests wait for models", 5)
        self._waiting[client] += 1
        until = min(deadline, time.monotonic() + self.load_seconds)
        try:
            while True:
                self.check_accepting()
                if model.status == "failed" and time.monotonic() - model.failed < _RETRY:
                    raise busy(f"the model could not be loaded: {model.error}", _RETRY)
                self.load(model)
                if await model.entered(until - time.monotonic()):
                    return
                if time.monotonic() >= until:
                    raise busy("the model is still being loaded; try again", 10)
        finally:
            self._waiting[client] -= 1
            if not self._waiting[client]:
                del self._waiting[client]

    # ---- loading and unloading

    def load(self, model: PooledModel) -> None:
        """Queues a model to be loaded, unless it is loaded or queued already.

        Raises:
            EngineDeadError: it is loaded and its engine has stopped; the server is about to end.
        """
        if model.loading:
            return
        if model.loaded is not None and model.leaving is None:
            model.loaded.state.engine.check_alive()
            return
        model.loading = True
        self._wanted.append(model)
        self._wake.set()

    def unload(self, model: PooledModel) -> None:
        """Begins to unload a model, if it is loaded: it ends when the requests that use it have ended."""
        if model.loaded is not None and model.leaving is None:
            model.leaving = asyncio.ensure_future(self._unload(model))

    async def _unload(self, model: PooledModel) -> None:
        await model.idle()
        if model.loaded is not None:  # responses in the background have no request that uses the model
            await model.loaded.state.engine.drain(self.settings.request_seconds)
        await self._end(model)
        model.leaving = None
        self.unloads += 1
        _log.info("unloaded %s", model.file.name)

    async def _end(self, model: PooledModel) -> None:
        loaded, model.loaded = model.loaded, None
        if loaded is not None:
            await loaded.state.engine.close()
            await asyncio.to_thread(loaded.state.close)
            del loaded
            await asyncio.to_thread(gc.collect)  # models and engines refer to each other

    async def _run(self) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            while self._wanted:
                await self._load(self._wanted.popleft())

    async def _load(self, model: PooledModel) -> None:
        began = time.monotonic()
        if self.draining:
            model.settle(model.error)
            return
        try:
            if model.leaving is not None:
                await asyncio.shield(model.leaving)
            await self._make_room(model)
            loaded = await asyncio.to_thread(self._open, model.file, self.shared)
            await loaded.state.engine.start()
            await asyncio.to_thread(loaded.state.warm_up)
        except Exception as error:
            _log.error("%s could not be loaded: %s: %s", model.file.name, type(error).__name__, error)
            model.settle(_reason(error, model.file))
            return
        model.loaded, model.used = loaded, time.monotonic()
        self.loads += 1
        _log.info("loaded %s in %.1f s, %s", model.file.name, time.monotonic() - began, mb(loaded.bytes))
        model.settle(None)

    async def _make_room(self, model: PooledModel) -> None:
        """Unloads the least recently used models until this one fits.

        Raises:
            ConfigError: it does not fit beside the pinned models.
        """
        needed = model.file.bytes + self.cache
        while True:
            taken = sum(other.loaded.bytes for other in self.loaded if other.loaded is not None)
            if taken + needed <= self.memory:
                return
            others = [other for other in self.loaded if not other.pinned and other is not model]
            if not others:
                raise ConfigError(
                    f"it needs {mb(needed)}, and {mb(max(0, self.memory - taken))} of {mb(self.memory)} for models "
                    "(--models-memory) are free"
                )
            victim = min(others, key=lambda other: (other.leaving is None, other.busy, other.used))
            self.unload(victim)
            if victim.leaving is not None:
                await asyncio.shield(victim.leaving)


def _reason(error: Exception, file: ModelFile) -> str:
    """Why a model could not be loaded, for clients: without paths."""
    if not isinstance(error, (DeepSeekOptimizerError, MemoryError)):
        return type(error).__name__
    text = str(error).replace(file.path, file.name)
    return type(error).__name__ if any(word.startswith("/") for word in text.split()) else text
