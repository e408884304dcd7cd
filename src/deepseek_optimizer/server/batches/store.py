"""The batches of a server: created, run one after the other for each API key, cancelled, and continued after a restart.

Requests go through the server's own application, after those of waiting clients: the engine schedules them with the lowest
priority. With `state_dir`, files and batches are there; else they are in a temporary folder, which is deleted with the server.
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ...checkpoint.atomic import atomic_file
from ..http.problems import INTERNAL, ApiError
from ..settings import ServerSettings
from .file_store import BatchFile, BatchFiles
from .in_thread import in_thread
from .job import Batch, load_batch
from .run import Runner, partial_of, requests_of

logger = logging.getLogger("deepseek_optimizer.server")
_FOLDER, _FILES, _JOBS = "batches", "files", "jobs"
_MAX_ENDED = 1000  # batches of an owner that have ended; older ones are deleted


class Batches:
    """All methods are for the event loop's thread.

    Args:
        settings: the server's.
        clock: Unix time in seconds.

    Attributes:
        files: uploaded requests, and results.
    """

    def __init__(self, settings: ServerSettings, clock: Callable[[], float] = time.time) -> None:
        self._settings, self._clock = settings, clock
        self._temporary = None
        if settings.state_dir is None:
            self._temporary = tempfile.TemporaryDirectory(prefix="dso-batches-", ignore_cleanup_errors=True)
        root = Path(self._temporary.name) if self._temporary is not None else Path(settings.state_dir or "") / _FOLDER
        self._jobs = root / _JOBS
        for folder in (root / _FILES, self._jobs):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.files = BatchFiles(root / _FILES, settings, clock)
        self._batches = {batch.id: batch for batch in sorted(self._stored(), key=lambda batch: batch.created)}
        self._creating: dict[str, str] = {}  # id -> owner, of batches whose requests are being kept
        self._clear()
        self._tasks: dict[str, asyncio.Task[None]] = {}  # by owner
        self._ends: dict[str, asyncio.Event] = {}  # of running batches, by id; set to end one early
        self._saving = asyncio.Lock()
        self._runner: Runner | None = None

    def _stored(self) -> list[Batch]:
        found = []
        for path in self._jobs.glob("*.json"):
            try:
                found.append(load_batch(path))
            except (OSError, ValueError, TypeError):
                logger.error("the description of a batch, %s, is damaged; the batch is not listed", path)
        return found

    def _clear(self) -> None:
        """Deletes what a server that was killed left, and counts the requests that batches keep."""
        for path in [*self._jobs.glob("*.requests.jsonl"), *self._jobs.glob("*.results.partial")]:
            if not (self._jobs / f"{path.name.partition('.')[0]}.json").exists():
                path.unlink()
        for batch in self._batches.values():
            if (requests := requests_of(batch, self._jobs)).exists():
                self.files.keep(batch.id, batch.owner, batch.input_file, requests.stat().st_size)

    @property
    def running(self) -> bool:
        """Whether a batch is being answered."""
        return any(not task.done() for task in self._tasks.values())

    def start(self, app: Any, accepting: Callable[[], bool], at_once: int, max_line: int) -> None:
        """Runs batches from now on, those of an earlier server first.

        Args:
            app: the server's application.
            accepting: whether it accepts requests now.
            at_once: maximum number of answers that are computed at once.
            max_line: maximum bytes of a request.
        """
        self._runner = Runner(self.files, self._jobs, self._save, app, accepting, at_once, max_line, self._clock)
        for batch in self._batches.values():
            if batch.ended:
                self._delete_work(batch)
            elif not self._settings.keys.has(batch.owner):
                batch.fail(self._clock(), "invalid_api_key", "the API key of the batch is not accepted any more")
        self._run_owners()

    async def stop(self) -> None:
        """Stops running; batches that have not ended continue when a server with the same `state_dir` starts."""
        self._runner = None
        for task in self._tasks.values():
            task.cancel()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)

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
            ApiError: 400, there is no such file; 413, the owner's files exceed the limit; 429, too many batches have not ended;
                507, it cannot be stored.
        """
        file = self.files.find(owner, input_file)
        if file is None:
            raise _no_file()
        self.files.check_room(owner)
        own, most = self.of(owner), self._settings.max_batches_per_client
        if sum(not batch.ended for batch in own) + list(self._creating.values()).count(owner) >= most:
            raise ApiError(
                429, f"{most} of your batches have not ended, which is the maximum; wait for one, or cancel it",
                code="too_many_batches", headers={"Retry-After": "60"},
            )  # fmt: skip
        now = int(self._clock())
        id = f"batch_{secrets.token_hex(12)}"
        batch = Batch(id, owner, endpoint, input_file, window, metadata, now, now + _seconds_of(window), seconds)
        self._creating[id] = owner  # it is not run before its requests are there
        self.files.keep(id, owner, file.id, file.size)
        try:
            await in_thread(self._keep_requests, batch, file)
            await self._save(batch)
            self._batches[id] = batch
        except FileNotFoundError:
            raise _no_file() from None  # it has just been deleted
        except OSError as error:
            logger.error("a batch cannot be stored: %s", error)
            raise _full() from None
        finally:
            del self._creating[id]
            if id not in self._batches:
                (self._jobs / f"{id}.json").unlink(missing_ok=True)
                self._delete_work(batch)
        for old in [one for one in own if one.ended][:-_MAX_ENDED]:
            await self._forget(old)
        self._run(owner)
        return batch

    def _keep_requests(self, batch: Batch, file: BatchFile) -> None:
        """Keeps the requests while the batch is not done, whatever happens to the file."""
        try:
            os.link(self.files.path(file), requests_of(batch, self._jobs))
        except FileNotFoundError:
            raise
        except OSError:  # a file system without links
            shutil.copyfile(self.files.path(file), requests_of(batch, self._jobs))

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
            ApiError: 409, it has ended; 507, that it is cancelled cannot be stored.
        """
        if batch.ended:
            raise ApiError(409, f"a batch whose status is {batch.status} cannot be cancelled", param="batch_id")
        batch.begin("cancelling", self._clock())
        self._end_waiting(batch, "cancelled")
        if (end := self._ends.get(batch.id)) is not None:
            end.set()
        try:
            await self._save(batch)
        except OSError as error:
            logger.error("a batch cannot be stored: %s", error)
            raise _full() from None
        self._run(batch.owner)

    async def sweep(self) -> None:
        """Deletes expired files, and batches that ended long ago; ends waiting ones whose time is over, and runs those whose
        run was stopped by a full disk or an engine that has ended."""
        await in_thread(self.files.sweep)
        now = self._clock()
        for batch in list(self._batches.values()):
            if batch.ended and batch.created < now - self._settings.batch_seconds:
                await self._forget(batch)
            elif not batch.ended and batch.expires <= now and self._end_waiting(batch, "expired"):
                await self._save(batch)
        self._run_owners()

    def _end_waiting(self, batch: Batch, status: str) -> bool:
        """Ends a batch that does not run and has no answers; returns whether it is one."""
        if batch.id in self._ends or partial_of(batch, self._jobs).exists():
            return False
        batch.begin(status, self._clock())
        self._delete_work(batch)
        return True

    async def _forget(self, batch: Batch) -> None:
        self._batches.pop(batch.id, None)
        await in_thread((self._jobs / f"{batch.id}.json").unlink, missing_ok=True)

    async def _save(self, batch: Batch) -> None:
        """Writes a batch as it is when its turn comes, so that the last state is the one that stays."""
        async with self._saving:
            await in_thread(_write, self._jobs / f"{batch.id}.json", batch.to_json())

    def _run_owners(self) -> None:
        for owner in {batch.owner for batch in self._batches.values() if not batch.ended}:
            self._run(owner)

    def _run(self, owner: str) -> None:
        task = self._tasks.get(owner)
        if self._runner is not None and (task is None or task.done()):
            self._tasks[owner] = asyncio.ensure_future(self._run_all(owner, self._runner))

    async def _run_all(self, owner: str, runner: Runner) -> None:
        """Runs the owner's batches, the oldest first, until all have ended, or one cannot go further for now."""
        while (batch := next((one for one in self.of(owner) if not one.ended), None)) is not None:
            end = self._ends[batch.id] = asyncio.Event()
            if batch.cancelled:
                end.set()
            try:
                await runner.run(batch, end)
            except OSError as error:
                logger.error("the batch %s cannot be stored: %s", batch.id, error)
                return
            except Exception:
                logger.exception("error in the batch %s", batch.id)
                batch.fail(self._clock(), "internal_error", INTERNAL.message)
                await self._save(batch)
            finally:
                del self._ends[batch.id]
            if not batch.ended:  # the engine has stopped
                return
            self._delete_work(batch)

    def _delete_work(self, batch: Batch) -> None:
        """Deletes what a batch that has ended needs no more."""
        for path in (requests_of(batch, self._jobs), partial_of(batch, self._jobs)):
            path.unlink(missing_ok=True)
        self.files.release(batch.id)


def _seconds_of(window: str) -> int:
    return 3600 * int(window.removesuffix("h"))


def _no_file() -> ApiError:
    return ApiError(
        400, "input_file_id: there is no such file with purpose batch; files expire: upload it again",
        param="input_file_id", code="file_not_found",
    )  # fmt: skip


def _full() -> ApiError:
    return ApiError(507, "the server's disk cannot be written", code="storage_failed")


def _write(path: Path, data: bytes) -> None:
    with atomic_file(path) as out:
        out.write(data)
