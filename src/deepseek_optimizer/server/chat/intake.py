"""How every route that works for a body begins: a place in the queue first, then what the body says."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager
from functools import partial
from typing import Any

from fastapi import Request

from ..http.caller import Caller, unless_gone
from ..protocol.base import Model, parse
from ..state import ServerState

_PROMPTS = ("prompt", "input")  # fields that may be tokens


@asynccontextmanager
async def admitted_request(
    state: ServerState, request: Request, model: type[Model], *, one: bool = False
) -> AsyncIterator[tuple[Model, ExitStack, Caller]]:
    """The body, checked; its places in the engine's queue, which whoever answers later takes along by `pop_all`; and who asks.
    What is done with it is cancelled when the client leaves.

    Args:
        one: the body asks for one answer, whatever its fields seem to say.

    Raises:
        ApiError, EngineBusyError, EngineDeadError: the server is stopping, the queue is full, the body is not what it should
            be, or `model` names another one.
        ClientDisconnect: the client has left.
    """
    state.check_taking()
    body, size = await state.bodies.read(request)
    caller = Caller(request.state.client, size, state.deadline(request.state.arrived))
    with state.admit({} if one else body, caller.key) as places:
        async with unless_gone(request):
            asked = await state.bodies.working(caller.key, size, partial(_checked, state, model, body))
            state.check_model(getattr(asked, "model", None))
            yield asked, places, caller


def _checked(state: ServerState, model: type[Model], body: dict[str, Any]) -> Model:
    for field in _PROMPTS:
        state.prompt_size.check_tokens(body.get(field), field)
    return parse(model, body)
