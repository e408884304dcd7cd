"""The batches of a server: created, run one after the other for each API key, cancelled, and continued after a restart.

Requests go through the server's own application, after those of waiting clients: the engine schedules them with the lowest
priority. With `state_dir`, files and batches are there; else they are in a temporary folder, which is deleted with the server.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..http.problems import INTERNAL, ApiError
from ..settings import ServerSettings
from .file_store import BatchFiles
from .job import Batch, load_batch
from .run import run_batch_job

logger = logging.getLogger("deepseek_optimizer.server")
_FOLDER, _FILES, _JOBS = "batches", "files", "jobs"


class Batches:
    """All methods but `sweep` are for the event loop's thread.

    Args:
        settings: the server's.
        clock: Unix time in seconds.

    Attributes:
        files: uploaded requests, and results.
    """

    def __init__(self, settings: ServerSettings, clock: Callable[[], float] = time.time) -> None:
        self._settings, self._clock = settings, clock
        self._temporary = None if settings.state_dir is not None else tempfile.TemporaryDirectory(prefix="dso-batches-")
        root = Path(self._temporary.name) if self._temporary is not None else Path(settings.state_dir or "") / _FOLDER
        self._jobs = root / _JOBS
        for folder in (root / _FILES, self._jobs):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.files = BatchFiles(root / _FILES, settings, clock)
        self._batches = {batch.id: batch for batch in sorted(self._stored(), key=lambda batch: batch.created)}
        self._running: dict[str, asyncio.Task[None]] = {}  # by owner
        self._ends: dict[str, asyncio.Event] = {}  # of running batches that may be cancelled, by id
        self._app: Any = None
        self._accepting: Callable[[], bool] = lambda: True
        self._at_once = 1

    def _stored(self) -> list[Batch]:
        found = []
        for path in self._jobs.glob("*.json"):
            try:
                found.append(load_batch(path))
            except (OSError, ValueError, TypeError):
                logger.error("the description of a batch, %s, is damaged; the batch is not listed", path)
        return found

    def start(self, app: Any, accepting: Callable[[], bool], at_once: int) -> None:
        """Runs batches from now on, those of an earlier server first.

        Args:
            app: the server's application.
            accepting: whether it accepts requests now.
            at_once: maximum number of requests of an owner in flight.
        """
        self._app, self._accepting, self._at_once = app, accepting, at_once
        for batch in self._batches.values():
            if not batch.ended:
                self._run(batch.owner)

    async def stop(self) -> None:
        """Stops running; batches that have not ended continue when a server with the same `state_dir` starts."""
        for task in self._running.values():
            task.cancel()
        await asyncio.gather(*self._running.values(), return_exceptions=True)

    def close(self) -> None:
        """Deletes the temporary folder."""
        if self._temporary is not None:
            self._temporary.cleanup()

    async def create(
        self, owner: str, input_file: str, endpoint: str, window: str, metadata: dict[str, str] | None, seconds: float | None
    ) -> Batch:
        """Creates a batch and starts it.

        Args:
            owner: salt of the API key.
            input_file: id of the file of requests.
            endpoint, window, metadata: see `Batch`.
            seconds: until the files of results expire; None: as in the settings.

        Raises:
            ApiError: 400, there is no such file, or too many batches have not ended; 507, it cannot be stored.
        """
        if self.files.find(owner, input_file) is None:
            raise ApiError(
                400, "input_file_id: there is no such file with purpose batch; files expire: upload it again",
                param="input_file_id", code="file_not_found",
            )  # fmt: skip
        most = self._settings.max_batches_per_client
        if sum(batch.owner == owner and not batch.ended for batch in self._batches.values()) >= most:
            raise ApiError(
                429, f"{most} of your batches have not ended, which is the maximum; wait for one, or cancel it",
                code="too_many_batches", headers={"Retry-After": "60"},
            )  # fmt: skip
        now = int(self._clock())
        id = f"batch_{secrets.token_hex(12)}"
        batch = Batch(id, owner, endpoint, input_file, window, metadata, now, now + _seconds_of(window), seconds)
        try:
            await asyncio.to_thread(batch.save, self._jobs)
        except OSError as error:
            logger.error("a batch cannot be stored: %s", error)
            raise ApiError(507, "the server's disk cannot be written", code="storage_failed") from None
        self._batches[batch.id] = batch
        self._run(owner)
        return batch

    def get(self, owner: str, id: str) -> Batch:
        """The owner's batch with this id.

        Raises:
            ApiError: 404, there is none.
        """
        batch = self._batches.get(id)
        if batch is None or batch.owner != owner:
            raise ApiError(404, "there is no such batch", param="batch_id", code="batch_not_found")
        return batch

    def of(self, owner: str) -> list[Batch]:
        """The batches of an owner, oldest first."""
        return [batch for batch in self._batches.values() if batch.owner == owner]

    async def cancel(self, batch: Batch) -> None:
        """Ends a batch; the answers that there are will be in its files.

        Raises:
            ApiError: 409, it has ended.
        """
        if batch.ended:
            raise ApiError(409, f"a batch whose status is {batch.status} cannot be cancelled", param="batch_id")
        if batch.status in ("validating", "in_progress"):
            batch.begin("cancelling", self._clock())
            await asyncio.to_thread(batch.save, self._jobs)
            self._end_of(batch).set()

    def sweep(self) -> None:
        """Deletes expired files, and batches that ended long ago. Waits for the disk."""
        self.files.sweep()
        past = self._clock() - self._settings.batch_seconds
        for batch in [batch for batch in list(self._batches.values()) if batch.ended and batch.created < past]:
            del self._batches[batch.id]
            (self._jobs / f"{batch.id}.json").unlink(missing_ok=True)

    def _end_of(self, batch: Batch) -> asyncio.Event:
        return self._ends.setdefault(batch.id, asyncio.Event())

    def _run(self, owner: str) -> None:
        if self._app is not None and owner not in self._running:
            task = asyncio.ensure_future(self._run_all(owner))
            self._running[owner] = task
            task.add_done_callback(lambda _: self._running.pop(owner, None))

    async def _run_all(self, owner: str) -> None:
        """Runs the owner's batches, the oldest first, until all have ended."""
        while (batch := next((one for one in self.of(owner) if not one.ended), None)) is not None:
            try:
                await run_batch_job(
                    batch, self.files, self._jobs, self._end_of(batch), self._app, self._accepting, self._at_once, self._clock
                )
            except OSError as error:
                logger.error("the batch %s cannot be stored: %s", batch.id, error)
                return  # the next batch, or the next server, tries again
            except Exception:
                logger.exception("error in the batch %s", batch.id)
                batch.begin("failed", self._clock())
                batch.errors = [{"code": "internal_error", "line": None, "message": INTERNAL.message, "param": None}]
                await asyncio.to_thread(batch.save, self._jobs)
            if not batch.ended:  # the engine has stopped
                return
            self._ends.pop(batch.id, None)


def _seconds_of(window: str) -> int:
    return 3600 * int(window.removesuffix("h"))
