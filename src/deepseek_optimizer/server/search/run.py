"""Runs the engine requests of one API request, a bounded number at once, and collects their outputs."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request as HttpRequest

from ...engine.request import Output, Request
from ...errors import EngineBusyError
from ..chat.replies import failure
from ..http.caller import Caller
from ..state import ServerState
from .texts import Tokens

_AT_ONCE = 32  # requests to the engine: enough short texts for a step


@dataclass(frozen=True)
class Job:
    """What the engine requests of an API request have in common.

    Attributes:
        name: their id, to which the engine adds a number.
        salt: of the API key, for the prefix cache.
        priority: as in `Request`.
        caller: who sent the request.
    """

    name: str
    salt: str
    priority: int
    caller: Caller

    def model(self, state: ServerState) -> str:
        """The name of the model in the response: that of the adapter, if the request uses one."""
        return self.caller.adapter or state.model_name

    def request(self, tokens: Tokens, **fields: Any) -> Request:
        """An engine request for a text.

        Args:
            tokens: the text.
            fields: further fields of `Request`.
        """
        return Request(
            tokens.ids, id=self.name, salt=self.salt, client=self.caller.key, deadline=self.caller.deadline,
            priority=self.priority, adapter=self.caller.adapter, token_types=tokens.types, **fields,
        )  # fmt: skip


def job_of(request: HttpRequest, kind: str, priority: int | None, caller: Caller) -> Job:
    """What the engine requests of an API request have in common.

    Args:
        request: the HTTP request.
        kind: beginning of its id.
        priority: None: 0.
        caller: who sent it.
    """
    return Job(f"{kind}-{uuid.uuid4().hex}", request.state.salt, priority or 0, caller)


async def run_all(state: ServerState, requests: Sequence[Request], caller: Caller) -> list[Output]:
    """Runs requests that read a prompt, and returns the output of each. One place in the engine's queue must be held already.

    A request with many texts holds a few further places, as far as they are free: so it is never refused after its first, and
    thousands of texts do not fill the queue.

    Args:
        state: the server's.
        requests: the requests.
        caller: who sent the request.

    Raises:
        ApiError: a request failed, or timed out.
        EngineDeadError, RequestError: see `AsyncEngine`.
    """
    outputs: dict[int, Output] = {}
    remaining = iter(enumerate(requests))

    async def work() -> None:
        for index, request in remaining:
            outputs[index] = await _run(state, request)

    with ExitStack() as places:
        at_once = 1 + _further_places(state, min(len(requests), _AT_ONCE) - 1, caller, places)
        workers = [asyncio.ensure_future(work()) for _ in range(at_once)]
        try:
            await asyncio.gather(*workers)
        finally:
            for worker in workers:
                worker.cancel()
    return [outputs[index] for index in range(len(requests))]


def _further_places(state: ServerState, count: int, caller: Caller, places: ExitStack) -> int:
    """Takes up to `count` places in the engine's queue; returns how many. `places` releases them."""
    while count > 0:
        try:
            places.enter_context(state.engine.admit(count, caller.key))
            return count
        except EngineBusyError:
            count //= 2
    return 0


async def _run(state: ServerState, request: Request) -> Output:
    """The last output of a request, which is cancelled if the caller is."""
    answers = state.engine.submit(request)
    last = None
    try:
        async for output in answers:
            last = output
    finally:
        answers.cancel()
    assert last is not None
    if (error := failure(state, last)) is not None:
        raise error
    return last
