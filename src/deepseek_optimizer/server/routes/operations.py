"""/version, /load and, if the operator allows it, /sleep, /wake_up and /is_sleeping, as vLLM has them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Annotated, Any, Literal

from fastapi import FastAPI, Query, Response

from ...versions import versions
from ..chat.replies import json_response
from ..http.fair_queue import FairQueue
from ..openapi import errors
from ..protocol.operations import Load, Sleeping, Slept, Version
from ..state import ServerState

_PACKAGE = "deepseek-optimizer"


def add_version(app: FastAPI) -> None:
    @app.get("/version", response_model=Version, responses=errors(401, 403), tags=["status"])
    async def version() -> Response:
        """The version of the server."""
        return json_response({"version": versions(_PACKAGE)[_PACKAGE]})


def load_of(states: Sequence[ServerState], queues: Iterable[FairQueue]) -> dict[str, Any]:
    """The number of requests in engines and queues; queues with one name are added up."""
    loads = [state.engine.load for state in states]
    running: Counter[str] = Counter()
    waiting: Counter[str] = Counter()
    for queue in queues:
        running[queue.name] += queue.running
        waiting[queue.name] += queue.waiting
    return {
        "server_load": sum(state.engine.admitted for state in states),
        "running": sum(load[0] for load in loads),
        "waiting": sum(load[1] for load in loads),
        "queues": {name: {"running": running[name], "waiting": waiting[name]} for name in running},
    }


def add(app: FastAPI, state: ServerState) -> None:
    add_version(app)

    @app.get("/load", response_model=Load, responses=errors(401, 403), tags=["status"])
    async def load() -> Response:
        """The number of requests in the server, for load balancers: `server_load` counts all that are admitted, of which some
        are running in the engine and some are waiting for it, and some are in the server's queues."""
        return json_response(load_of([state], state.queues))

    @app.get("/is_sleeping", response_model=Sleeping, responses=errors(401, 403), tags=["status"])
    async def is_sleeping() -> Response:
        """Whether the server sleeps."""
        return json_response({"is_sleeping": state.sleeping})

    if not state.settings.sleep_mode:
        return

    @app.post("/sleep", response_model=Slept, responses=errors(401, 403, 429, 503), tags=["status"])
    async def sleep(
        level: Annotated[Literal["1", "2"], Query(description="vLLM's levels, which do the same here.")] = "1",
        mode: Annotated[
            Literal["wait", "abort"], Query(description="What happens to requests in flight: they end, or are cancelled.")
        ] = "wait",
    ) -> Response:
        """Releases the memory of the cache and of mapped weights. Until /wake_up, requests are answered with status 503."""
        seconds = 0 if mode == "abort" else state.settings.drain_seconds
        return json_response(
            {"released_bytes": await state.sleep(seconds, "weights_offloaded" if level == "1" else "discard_all")}
        )

    @app.post("/wake_up", response_model=Sleeping, responses=errors(401, 403, 503), tags=["status"])
    async def wake_up(
        tags: Annotated[
            list[Literal["weights", "kv_cache"]] | None,
            Query(description="Parts to wake up; the sleep ends when both are awake. By default both."),
        ] = None,
    ) -> Response:
        """Ends the sleep: mapped weights are read again as they are needed, beginning now."""
        await state.wake_up(tags or ("weights", "kv_cache"))
        return json_response({"is_sleeping": state.sleeping})
