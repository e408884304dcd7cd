"""A batch job on Ray Data: worker processes, each with an engine, answer the requests, and this process writes their results.

Each request is answered as on one machine, with the same seed and ids, whichever worker it goes to; so a job may be continued
with another number of workers, or without Ray.
"""

from __future__ import annotations

import asyncio
import base64
import json
import logging
import pickle
from collections.abc import Callable, Generator
from contextlib import AsyncExitStack, closing
from dataclasses import dataclass, replace
from typing import Any

import httpx
import ray
import ray.data
from ray.data.block import BlockAccessor

from ..batch.places import Places
from ..batch.requests import BatchInput, BatchRequest
from ..batch.results import Results
from ..batch.run import answer, client_of
from ..errors import ConfigError, DeepSeekOptimizerError
from ..server.app import create_app
from ..server.loading import load_served_model
from ..server.served_model import ServedModel
from ..server.settings import ServerSettings
from ..system.interpreter import switch_often
from .start import start

logger = logging.getLogger("deepseek_optimizer.ray")
_BLOCK = 4  # requests: their answers arrive together


@dataclass(frozen=True)
class Workers:
    """The processes that answer requests.

    Attributes:
        count: how many there are.
        cpus: processor cores of each, and the threads of its engine.
        gpus: of each.
        address: of a Ray cluster that runs, "auto" for one of this machine; None: Ray is started here.
        at_once: maximum number of answers that a worker computes at once.
    """

    count: int
    cpus: float
    gpus: float
    address: str | None
    at_once: int

    def __post_init__(self) -> None:
        """Raises ConfigError for an invalid value."""
        if self.count < 1 or not self.cpus > 0 or self.at_once < 1:
            raise ConfigError(f"a job needs 1 or more workers with more than 0 cores, got {self.count} with {self.cpus:g}")


class Answerer:
    """The class that Ray Data creates in each worker process, where it loads the model.

    Args:
        served, settings: the model and the server.
        job: the job, without its requests.
        at_once: see `Workers`.
    """

    def __init__(self, served: ServedModel, settings: ServerSettings, job: BatchInput, at_once: int) -> None:
        switch_often()
        self._job, self._places = job, Places(at_once)
        self._failure: DeepSeekOptimizerError | None = None
        try:
            engine, settings, _, _ = load_served_model(served, settings, logger.warning)
            self._app = create_app(engine, settings)
        except DeepSeekOptimizerError as error:
            self._failure = error  # returned by a call: Ray reports what is raised here as the death of the process
        self._client: httpx.AsyncClient | None = None
        self._opened = AsyncExitStack()
        self._opening = asyncio.Lock()

    async def __call__(self, block: dict[str, Any]) -> dict[str, Any]:
        """Answers a block of requests.

        Args:
            block: columns `index` and `request`: a `BatchRequest`'s index, and its other fields in JSON.

        Returns:
            The columns `index`, `line` and `error`: as above, the output's line in JSON, and an error that ends the job: the
            model cannot be loaded, or the engine has stopped. Ray would add its own advice to an error that is raised.
        """
        rows = list(zip(block["index"].tolist(), block["request"].tolist(), strict=True))
        try:
            if self._failure is not None:
                raise self._failure
            client = await self._connected()

            async def line(index: int, text: str) -> str:
                request = BatchRequest(index, **json.loads(text))
                return json.dumps(await answer(client, self._job, request, self._job.written, self._places))

            lines, error = list(await asyncio.gather(*[line(*row) for row in rows])), ""
        except DeepSeekOptimizerError as failure:
            lines, error = [""] * len(rows), base64.b64encode(pickle.dumps(failure)).decode("ascii")
        return {"index": block["index"], "line": lines, "error": [error] * len(rows)}

    async def _connected(self) -> httpx.AsyncClient:
        async with self._opening:
            if self._client is None:
                self._client = await self._opened.enter_async_context(client_of(self._app))
            return self._client


def run_batch(
    served: ServedModel,
    settings: ServerSettings,
    workers: Workers,
    job: BatchInput,
    results: Results,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Answers all requests that have no results yet on Ray's workers, and adds their results.

    A worker that dies is replaced, and its requests are answered by another.

    Args:
        served: the model, which every node of the cluster must find.
        settings: the server's.
        workers: the processes that answer.
        job, results, progress: see `batch.run.run_batch`.

    Raises:
        DeepSeekOptimizerError: of a worker: the model cannot be loaded, or its engine has stopped.
        OSError: a result cannot be written.
    """
    rows = [
        {
            "index": request.index,
            "request": json.dumps({"custom_id": request.custom_id, "url": request.url, "body": request.body}),
        }
        for request in job.requests
        if request.index not in results.done
    ]
    progress(len(results.done), len(job.requests))
    if not rows:
        return
    served = replace(served, config={"threads": max(1, int(workers.cpus)), **served.config})
    started = not ray.is_initialized()
    if started:
        start(workers.address, log_to_driver=False)
    try:
        _check_resources(workers)
        with closing(_answers(served, settings, workers, replace(job, requests=(), written=results.written), rows)) as answers:
            for row in answers:
                if row["error"]:
                    raise pickle.loads(base64.b64decode(row["error"]))
                if row["index"] not in results.done:  # a worker that died may have answered it already
                    results.add(int(row["index"]), json.loads(row["line"]))
                    progress(len(results.done), len(job.requests))
    finally:
        if started:
            ray.shutdown()


def _answers(
    served: ServedModel, settings: ServerSettings, workers: Workers, job: BatchInput, rows: list[dict[str, Any]]
) -> Generator[dict[str, Any], None, None]:
    """The rows of `Answerer`, in the order in which they are ready.

    Blocks are read in this thread. `Dataset.iter_rows` reads them in others, which go on for a moment after an error has ended
    the loop, and one that uses Ray after it has been shut down ends the process.
    """
    at_once = -(-workers.at_once // _BLOCK)  # blocks that a worker answers together
    context = ray.data.DataContext.get_current().copy()
    context.enable_progress_bars = False  # the job has one
    with ray.data.DataContext.current(context):
        answers = ray.data.from_items(rows, override_num_blocks=-(-len(rows) // _BLOCK)).map_batches(
            Answerer,
            batch_size=None,  # a block
            compute=ray.data.ActorPoolStrategy(
                size=workers.count, max_tasks_in_flight_per_actor=at_once + 1, max_concurrent_calls_per_actor=at_once
            ),
            fn_constructor_args=(served, settings, job, workers.at_once),
            num_cpus=workers.cpus,
            num_gpus=workers.gpus,
        )
        for bundle in answers.iter_internal_ref_bundles():
            for reference in bundle.block_refs:
                yield from BlockAccessor.for_block(ray.get(reference)).iter_rows(public_row_format=True)


def _check_resources(workers: Workers) -> None:
    """Raises ConfigError if no machine of the cluster is large enough for a worker, for which Ray would wait."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    largest = max((node.get("CPU", 0.0) for node in nodes if node.get("GPU", 0.0) >= workers.gpus), default=None)
    if largest is None:
        raise ConfigError(f"no machine of the Ray cluster has {workers.gpus:g} GPUs for a worker")
    if largest < workers.cpus:
        raise ConfigError(
            f"--worker-cpus {workers.cpus:g}: the largest machine of the Ray cluster has {largest:g} cores; give less"
        )
