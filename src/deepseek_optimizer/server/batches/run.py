"""Runs one batch: validates its requests, has the server's application answer them, and writes the files of results."""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import httpx
from starlette.types import ASGIApp, Receive, Scope, Send

from ...batch.requests import BatchInput, read_requests
from ...batch.results import Results, encoded
from ...batch.run import BASE_URL, answer_all
from ...errors import DataError, EngineDeadError
from ..http.caller import FOR_OWNER
from ..settings import MAX_PRIORITY
from .file_store import BatchFiles
from .job import Batch

logger = logging.getLogger("deepseek_optimizer.server")
_PAUSE = 0.5  # seconds between looks whether the server accepts requests again
_EXPIRED = {"code": "batch_expired", "message": "This request could not be executed before the completion window expired."}


async def run_batch_job(
    batch: Batch,
    files: BatchFiles,
    jobs: Path,
    end: asyncio.Event,
    app: ASGIApp,
    accepting: Callable[[], bool],
    at_once: int,
    clock: Callable[[], float],
) -> None:
    """Runs a batch to its end, from where an earlier run stopped. If the engine stops, the batch has not ended.

    Args:
        batch: changed in place.
        files: with its requests, and for its results.
        jobs: the folder of batches.
        end: set when the client cancels the batch.
        app: the server's application.
        accepting: whether it accepts requests now.
        at_once: maximum number of requests in flight.
        clock: Unix time in seconds.

    Raises:
        OSError: a file cannot be written.
    """
    job = await asyncio.to_thread(_read, batch, files)
    if job is not None:
        batch.total = len(job.requests)
        if batch.status == "validating":
            batch.begin("in_progress", clock())
        await asyncio.to_thread(batch.save, jobs)
        ended = await _answer(batch, job, files, jobs, end, _Internal(app, batch.owner, accepting), at_once, clock)
        if not ended:
            return
    else:
        batch.begin("cancelled" if batch.status == "cancelling" else "failed", clock())
    await asyncio.to_thread(batch.save, jobs)
    _results_of(batch, jobs).with_suffix(".results.partial").unlink(missing_ok=True)


def _read(batch: Batch, files: BatchFiles) -> BatchInput | None:
    """The requests; None: they are not valid, and the batch says why."""
    file = files.find(batch.owner, batch.input_file)
    try:
        if file is None:
            raise DataError("the file of requests was deleted, or has expired")
        job = read_requests(files.path(file))
        for request in job.requests:
            if request.url != batch.endpoint:
                message = f"the request {request.custom_id!r} is for {request.url}, but the batch is for {batch.endpoint}"
                raise DataError(message, field="url")
    except (DataError, FileNotFoundError) as error:
        # A DataError names the file on the server's disk, which is nobody's business.
        known = isinstance(error, DataError)
        message = str(getattr(error, "message", error)) if known else "the file of requests was deleted"
        line, param = (getattr(error, name, None) for name in ("line", "field"))
        batch.errors = [{"code": "invalid_request", "line": line, "message": message, "param": param}]
        return None
    digest = hashlib.sha256(f"{batch.id} {job.digest}".encode()).hexdigest()  # ids of answers differ between batches
    return replace(job, digest=digest, written=batch.created)


async def _answer(
    batch: Batch,
    job: BatchInput,
    files: BatchFiles,
    jobs: Path,
    end: asyncio.Event,
    app: ASGIApp,
    at_once: int,
    clock: Callable[[], float],
) -> bool:
    """Answers requests until all have results, the batch is cancelled, or its time is over, and writes the files of results;
    returns False if the engine has stopped."""
    with ExitStack() as opened:
        identity = {"batch": batch.id}
        results = await asyncio.to_thread(Results, _results_of(batch, jobs), identity, batch.total, batch.created)
        opened.enter_context(results)

        def count(_done: int, _total: int) -> None:
            batch.failed = len(results.failed)
            batch.completed = len(results.done) - batch.failed

        transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url=BASE_URL, timeout=None) as client:
            work = asyncio.ensure_future(answer_all(client, job, results, at_once, count, MAX_PRIORITY))
            cancelled = asyncio.ensure_future(end.wait())
            try:
                if batch.status != "cancelling":
                    seconds = max(0.0, batch.expires - clock())
                    await asyncio.wait({work, cancelled}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
            finally:
                complete = work.done()
                for task in (work, cancelled):
                    task.cancel()
                await asyncio.gather(work, cancelled, return_exceptions=True)
        count(0, 0)
        error = None if work.cancelled() else work.exception()
        if isinstance(error, EngineDeadError):
            logger.error("the batch %s stops, since the engine has stopped; it continues after a restart", batch.id)
            return False
        if error is not None:
            raise error
        status = "cancelled" if batch.status == "cancelling" else "completed" if complete else "expired"
        batch.begin("finalizing", clock())
        await asyncio.to_thread(_write, batch, job, results, files, status == "expired")
        batch.begin(status, clock())
        return True


def _write(batch: Batch, job: BatchInput, results: Results, files: BatchFiles, expired: bool) -> None:
    """Writes the files of answers and of errors, as far as there are any; those of an expired batch name the requests that
    have no result."""
    missing = [request for request in job.requests if request.index not in results.done] if expired else []
    if batch.completed:
        batch.output_file = batch.file_id("output")
        with files.writing(batch.owner, batch.output_file, f"{batch.id}_output.jsonl", seconds=batch.output_seconds) as out:
            for line in results.lines():
                if line["response"]["status_code"] == 200:
                    out.write(encoded(line))
    if batch.failed or missing:
        batch.error_file = batch.file_id("error")
        with files.writing(batch.owner, batch.error_file, f"{batch.id}_error.jsonl", seconds=batch.output_seconds) as out:
            for line in results.lines():
                if line["response"]["status_code"] != 200:
                    out.write(encoded(line))
            for request in missing:
                id = hashlib.sha256(f"{job.digest} {request.index}".encode()).hexdigest()[:32]
                line = {"id": f"batch_req_{id}", "custom_id": request.custom_id, "response": None, "error": _EXPIRED}
                out.write(encoded(line))


def _results_of(batch: Batch, jobs: Path) -> Path:
    return jobs / f"{batch.id}.results"


class _Internal:
    """The server's application for requests that the server sends itself: for the owner of the batch, without an API key. It
    waits while the server accepts no requests."""

    def __init__(self, app: ASGIApp, owner: str, accepting: Callable[[], bool]) -> None:
        self._app, self._owner, self._accepting = app, owner, accepting

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        while not self._accepting():
            await asyncio.sleep(_PAUSE)
        await self._app({**scope, FOR_OWNER: self._owner, "client": ("batch", 0)}, receive, send)
