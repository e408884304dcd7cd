"""Runs batches: validates their requests, has the server's application answer them, and writes the files of results."""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import Awaitable, Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from starlette.types import ASGIApp, Receive, Scope, Send

from ...batch.places import Places
from ...batch.requests import BatchInput, read_requests
from ...batch.results import Results, encoded
from ...batch.run import answer_all, client_of_started
from ...engine.request import MAX_PRIORITY
from ...errors import DataError, EngineDeadError, excerpt
from ..http.caller import FOR_OWNER
from .file_store import BatchFiles
from .in_thread import in_thread
from .job import Batch

logger = logging.getLogger("deepseek_optimizer.server")
_PAUSE = 0.5  # seconds between looks whether the server accepts requests again
_FULL = (
    "the results would exceed what the files of an API key may take; the answers so far are in the files. Delete some files."
)
_EXPIRED = {"code": "batch_expired", "message": "This request could not be executed before the completion window expired."}


class _FullError(Exception):
    """The results exceed what their owner's files may take."""


def requests_of(batch: Batch, jobs: Path) -> Path:
    """Where a batch has its requests until it ends."""
    return jobs / f"{batch.id}.requests.jsonl"


def partial_of(batch: Batch, jobs: Path) -> Path:
    """Where the results of a batch are until it ends."""
    results = _results_of(batch, jobs)
    return results.with_name(results.name + ".partial")


def _results_of(batch: Batch, jobs: Path) -> Path:
    return jobs / f"{batch.id}.results"


class Runner:
    """
    Args:
        files: for the results.
        jobs: the folder of batches.
        save: writes a batch; may raise OSError.
        app: the server's application.
        accepting: whether it accepts requests now.
        at_once: maximum number of answers that are computed at once, of all batches.
        max_line: maximum bytes of a request.
        clock: Unix time in seconds.
    """

    def __init__(
        self,
        files: BatchFiles,
        jobs: Path,
        save: Callable[[Batch], Awaitable[None]],
        app: ASGIApp,
        accepting: Callable[[], bool],
        at_once: int,
        max_line: int,
        clock: Callable[[], float],
    ) -> None:
        self._files, self._jobs, self._save, self._clock = files, jobs, save, clock
        self._app, self._accepting, self._max_line = app, accepting, max_line
        self._places = Places(at_once)

    async def run(self, batch: Batch, end: asyncio.Event) -> None:
        """Runs a batch to its end, from where an earlier run stopped. If the engine stops, the batch has not ended.

        Args:
            batch: changed in place.
            end: set to end it before all requests have results.

        Raises:
            OSError: a file cannot be written.
        """
        try:
            job = await in_thread(self._read, batch)
        except DataError as error:  # without the name of the file on the server's disk, which is nobody's business
            batch.fail(self._clock(), "invalid_request", error.message, error.line, error.field)
        else:
            batch.total = len(job.requests)
            if batch.cancelled:
                batch.status = "cancelling"
            elif batch.status == "validating":
                batch.begin("in_progress", self._clock())
            else:
                batch.status = "in_progress"
            await self._save(batch)
            if not await self._answer(batch, job, end):
                return
        await self._save(batch)

    def _read(self, batch: Batch) -> BatchInput:
        """The requests.

        Raises:
            DataError: they are not valid.
        """
        try:
            job = read_requests(requests_of(batch, self._jobs), self._max_line)
        except FileNotFoundError:
            raise DataError("the file of requests is lost; upload it again") from None
        for request in job.requests:
            if request.url != batch.endpoint:
                name = excerpt(request.custom_id)
                raise DataError(
                    f"the request {name!r} is for {request.url}, but the batch is for {batch.endpoint}", field="url"
                )
        digest = hashlib.sha256(f"{batch.id} {job.digest}".encode()).hexdigest()  # ids of answers differ between batches
        return replace(job, digest=digest, written=batch.created)

    async def _answer(self, batch: Batch, job: BatchInput, end: asyncio.Event) -> bool:
        """Answers requests until all have results, `end` is set, or the time of the batch is over, and writes the files of
        results; returns False if the engine has stopped."""
        with ExitStack() as opened:
            place, name = _results_of(batch, self._jobs), {"batch": batch.id}
            results = await in_thread(lambda: opened.enter_context(Results(place, name, batch.total, batch.created)))

            def count() -> None:
                batch.failed = len(results.failed)
                batch.completed = len(results.done) - batch.failed

            def progress(done: int, total: int) -> None:
                count()
                if done < total and not self._files.fits(batch.owner, results.size):
                    raise _FullError

            async with client_of_started(self._app_for(batch.owner)) as client:
                work = asyncio.ensure_future(
                    answer_all(client, job, results, self._places, progress, priority=MAX_PRIORITY, patient=True)
                )
                ended = asyncio.ensure_future(end.wait())
                try:
                    seconds = max(0.0, batch.expires - self._clock())
                    if not end.is_set():
                        await asyncio.wait({work, ended}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
                finally:
                    for task in (work, ended):
                        task.cancel()
                    await asyncio.gather(work, ended, return_exceptions=True)
            count()
            error = None if work.cancelled() else work.exception()
            if isinstance(error, EngineDeadError):
                logger.error("the batch %s stops, since the engine has stopped; it continues after a restart", batch.id)
                return False
            if error is not None and not isinstance(error, _FullError):
                raise error
            complete = len(results.done) == batch.total
            status = "cancelled" if batch.cancelled else "completed" if complete else "expired"
            batch.begin("finalizing", self._clock())
            await in_thread(self._write, batch, job, results, status == "expired" and error is None)
            if error is not None:
                batch.fail(self._clock(), "file_storage", _FULL)
            else:
                batch.begin(status, self._clock())
            return True

    def _write(self, batch: Batch, job: BatchInput, results: Results, expired: bool) -> None:
        """Writes the files of answers and of errors, as far as there are any; those of an expired batch name the requests that
        have no result."""
        missing = [request for request in job.requests if request.index not in results.done] if expired else []
        if batch.completed:
            id = batch.file_id("output")
            with self._files.writing(batch.owner, id, f"{batch.id}_output.jsonl", seconds=batch.output_seconds) as out:
                for line in results.lines():
                    if line["response"]["status_code"] == 200:
                        out.write(encoded(line))
            batch.output_file = id
        if batch.failed or missing:
            id = batch.file_id("error")
            with self._files.writing(batch.owner, id, f"{batch.id}_error.jsonl", seconds=batch.output_seconds) as out:
                for line in results.lines():
                    if line["response"]["status_code"] != 200:
                        out.write(encoded(line))
                for request in missing:
                    digest = hashlib.sha256(f"{job.digest} {request.index}".encode()).hexdigest()[:32]
                    line = {"id": f"batch_req_{digest}", "custom_id": request.custom_id, "response": None, "error": _EXPIRED}
                    out.write(encoded(line))
            batch.error_file = id

    def _app_for(self, owner: str) -> ASGIApp:
        """The server's application for requests that the server sends itself: for the owner of a batch, without an API key.
        They wait while the server accepts none."""

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            while not self._accepting():
                await asyncio.sleep(_PAUSE)
            await self._app({**scope, FOR_OWNER: owner}, receive, send)

        return app
