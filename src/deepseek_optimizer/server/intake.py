"""How every route that works for a body begins: a place in the queue first, then what the body says."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager

from fastapi import Request

from .protocol.base import Model, parse
from .state import ServerState


@asynccontextmanager
async def taken_in(
    state: ServerState, request: Request, model: type[Model], *, one: bool = False
) -> AsyncIterator[tuple[Model, ExitStack, float]]:
    """The body, checked; its places in the engine's queue, which whoever answers later takes along by `pop_all`; and its
    deadline, of `time.monotonic`.

    Args:
        one: the body asks for one answer, whatever its fields seem to say.

    Raises:
        ApiError, EngineBusyError, EngineDeadError: the server is stopping, the queue is full, the body is not what it should
            be, or `model` names another one.
    """
    state.check_taking()
    body = await state.bodies.read(request)
    with state.admit({} if one else body) as places:
        asked = parse(model, body)
        state.check_model(getattr(asked, "model", None))
        yield asked, places, state.deadline(request.state.arrived)
