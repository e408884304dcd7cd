"""Runs a batch job: the server's routes answer its requests, without a network, as many at once as the engine takes.

Results do not depend on when, or in how many runs, a request is answered: nothing random or of the moment is left in them.
Requests that sample and set no seed get one, ids are derived from the job and the request, and times and the number of prompt
tokens that were in the prefix cache are left out. The engine must be independent of the batch (`batch_invariant=True`) for
texts to be so.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import math
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Any

import httpx

from ..errors import EngineDeadError
from .places import Places, answers_of
from .requests import GENERATING, RESPONSES, BatchInput, BatchRequest
from .results import Results

BASE_URL = "http://localhost"
_FULL, _UNAVAILABLE, _TIMED_OUT = 429, 503, 504
_DEAD = ("engine_dead", "model_file_changed", "rank_lost")
_TRIES = 10  # for a request that the server has no memory or time for, or whose worker process is lost: it may be why
_LONGEST_WAIT = 60.0
_AGAIN = 0.1  # seconds until a task that still runs after its cancellation is cancelled again


async def run_batch(
    app: Any, job: BatchInput, results: Results, at_once: int, progress: Callable[[int, int], None] = lambda done, total: None
) -> None:
    """Answers all requests that have no results yet, and adds their results.

    Args:
        app: the server's application, which has not been started.
        job: the requests.
        results: of the same job.
        at_once: maximum number of answers that are computed at once.
        progress: called with the number of requests that have results, and the number of all.

    Raises:
        EngineDeadError: the engine has stopped; requests without an answer have no results.
    """
    async with client_of(app) as client:
        await answer_all(client, job, results, Places(at_once), progress)


@asynccontextmanager
async def client_of(app: Any) -> AsyncIterator[httpx.AsyncClient]:
    """Starts the server's application for the context, and yields a client of it."""
    async with app.router.lifespan_context(app), client_of_started(app) as client:
        yield client


def client_of_started(app: Any) -> httpx.AsyncClient:
    """A client of the server's application, which has been started, without a network."""
    transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
    return httpx.AsyncClient(transport=transport, base_url=BASE_URL, timeout=None)


async def answer_all(
    client: httpx.AsyncClient,
    job: BatchInput,
    results: Results,
    places: Places,
    progress: Callable[[int, int], None] = lambda done, total: None,
    priority: int = 0,
    patient: bool = False,
) -> None:
    """Answers all requests that have no results yet, and adds their results. If it is cancelled, no result is being written
    when it has ended.

    Args:
        client: its base URL is that of the server.
        job, results, progress: see `run_batch`; what `progress` raises ends this function.
        places: for the answers that are computed at once; other batches may use them too.
        priority: the lowest value for a request's `priority`; those with lower values come first.
        patient: try as long as the server has no memory or no model for a request.

    Raises:
        EngineDeadError: the engine has stopped; requests without an answer have no results.
        OSError: a result cannot be written.
    """
    waiting = iter([request for request in job.requests if request.index not in results.done])
    progress(len(results.done), len(job.requests))
    with ThreadPoolExecutor(1, "dso-batch") as writer:  # writing may wait for the disk
        more = (client, job, waiting, results, places, progress, priority, patient, writer)
        tasks = [asyncio.create_task(_answer_some(*more)) for _ in range(places.count)]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
            for task in done:
                task.result()
        finally:
            pending = set(tasks)
            while pending:  # before Python 3.12, asyncio.wait_for loses a cancellation that comes with the result
                for task in pending:
                    task.cancel()
                _, pending = await asyncio.wait(pending, timeout=_AGAIN)
            for task in tasks:  # all but the first exception have been dealt with
                if not task.cancelled():
                    task.exception()


async def _answer_some(
    client: httpx.AsyncClient,
    job: BatchInput,
    waiting: Iterator[BatchRequest],
    results: Results,
    places: Places,
    progress: Callable[[int, int], None],
    priority: int,
    patient: bool,
    writer: ThreadPoolExecutor,
) -> None:
    for request in waiting:
        line = await answer(client, job, request, results.written, places, priority, patient)
        await asyncio.get_running_loop().run_in_executor(writer, results.add, request.index, line)
        progress(len(results.done), len(job.requests))


async def answer(
    client: httpx.AsyncClient,
    job: BatchInput,
    request: BatchRequest,
    created: int,
    places: Places,
    priority: int = 0,
    patient: bool = False,
) -> dict[str, Any]:
    """The line of the output for a request; `created`: the time in its answer; the other arguments: see `answer_all`.

    Raises:
        EngineDeadError: the engine has stopped.
    """
    body = request.body
    if request.url in GENERATING and body.get("seed") is None:
        body = {**body, "seed": int(_digest(job, request, "seed")[:7], 16)}
    if request.url == RESPONSES:
        body = {**body, "store": False}  # the endpoint's default is true
    if priority and _number(body.get("priority")) < priority:
        body = {**body, "priority": priority}
    tries, wait, answers = 0, 0.5, answers_of(request.url, body)
    while True:
        async with places.taken(answers):
            response = await client.post(request.url, json=body)
        counts = response.status_code == _TIMED_OUT
        if response.status_code == _UNAVAILABLE:
            error = json.loads(response.content)["error"]
            if error["code"] in _DEAD:
                raise EngineDeadError(f"{error['message']}; start the same command again to continue")
            counts = not patient or error["code"] == "worker_lost"
        if response.status_code in (_UNAVAILABLE, _TIMED_OUT):
            tries += counts
            wait = min(2 * wait, _LONGEST_WAIT)
        if response.status_code not in (_FULL, _UNAVAILABLE, _TIMED_OUT) or tries == _TRIES:
            break
        await asyncio.sleep(wait)
    return {
        "id": f"batch_req_{_digest(job, request, 'line')[:32]}",
        "custom_id": request.custom_id,
        "response": {
            "status_code": response.status_code,
            "request_id": _digest(job, request, "request")[:32],
            "body": _settled(await asyncio.to_thread(json.loads, response.content), job, request, created),
        },
        "error": None,
    }


def _number(value: Any) -> float:
    """A number as the server may read it, which also accepts texts; infinity if it is none, which is the request's error."""
    try:
        return 0.0 if value is None else float(value)
    except (TypeError, ValueError, OverflowError):
        return math.inf


def _settled(body: Any, job: BatchInput, request: BatchRequest, created: int) -> Any:
    """An answer without what differs from run to run."""
    if not isinstance(body, dict):
        return body

    def digest(purpose: str, digits: int = 32) -> str:
        return _digest(job, request, purpose)[:digits]

    if isinstance(id := body.get("id"), str):
        separator = "-" if "-" in id else "_"  # chatcmpl-..., resp_...
        body["id"] = id.partition(separator)[0] + separator + digest("answer")
    for name in body.keys() & {"created", "created_at"}:
        body[name] = created
    body.pop("timings", None)
    if isinstance(usage := body.get("usage"), dict):
        for name in ("prompt_tokens_details", "input_tokens_details"):
            usage.pop(name, None)
    for choice in body.get("choices", ()):
        for n, call in enumerate((choice.get("message") or {}).get("tool_calls") or ()):
            call["id"] = "call_" + digest(f"call {n} of choice {choice['index']}", 24)
    for n, item in enumerate(body.get("output", ())):  # of /v1/responses
        item["id"] = item["id"].partition("_")[0] + "_" + digest(f"item {n}")
        if "call_id" in item:
            item["call_id"] = "call_" + digest(f"call of item {n}", 24)
    return body


def _digest(job: BatchInput, request: BatchRequest, purpose: str) -> str:
    """Hexadecimal digits that depend on the job, the request and the purpose only."""
    return hashlib.sha256(f"{job.digest} {request.index} {purpose}".encode()).hexdigest()
