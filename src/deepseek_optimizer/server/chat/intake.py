"""The beginning of every route with a JSON body: reading, admission to the engine's queue, then validation."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager
from dataclasses import replace
from functools import partial
from typing import Any

from fastapi import Request

from ..http.caller import Caller, cancel_on_disconnect
from ..protocol.base import Model
from ..protocol.tolerance import parse_body
from ..state import ServerState

_PROMPTS = ("prompt", "input")  # fields that may be token ids


@asynccontextmanager
async def admitted_request(
    state: ServerState, request: Request, model: type[Model], *, one: bool = False
) -> AsyncIterator[tuple[Model, ExitStack, Caller]]:
    """Yields the validated body, its places in the engine's queue, and the client. The context's body is cancelled if the
    client disconnects. The places are released at the end, unless the response takes them over with `pop_all`.

    Args:
        state: the server's.
        request: the HTTP request.
        model: of the body.
        one: the body requests one answer, regardless of its fields.

    Raises:
        ApiError, EngineBusyError, EngineDeadError: the server is stopping, the queue is full, the body is invalid, or its
            `model` is not the one that is served.
        ClientDisconnect: the client has disconnected.
    """
    state.check_accepting()
    body, size = await state.bodies.read(request)
    caller = Caller(request.state.client, size, state.deadline(request.state.arrived), request.state.ignored_fields)
    with state.admit({} if one else body, caller.key) as places:
        async with cancel_on_disconnect(request):
            parsed, ignored = await state.bodies.working(caller.key, size, partial(_checked, state, model, body))
            caller.ignored.extend(ignored)
            model_name = getattr(parsed, "model", None)
            state.check_model(model_name)
            yield parsed, places, replace(caller, adapter=state.adapter_named(model_name))


def _checked(state: ServerState, model: type[Model], body: dict[str, Any]) -> tuple[Model, list[str]]:
    """The validated body, and the names of its ignored fields."""
    for field in _PROMPTS if body.get("truncate_prompt_tokens") is None else ():
        state.prompt_size.check_tokens(body.get(field), field)
    return parse_body(model, body, state.settings.strict)
