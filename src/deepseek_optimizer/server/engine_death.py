"""How a server learns that its engine has stopped. Nothing can be answered then, so that the process ends, and whatever
supervises it starts it again."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import Any

from ..errors import DeepSeekOptimizerError, EngineDeadError

_LOOK_SECONDS = 1.0  # between two looks; a process that has been killed is noticed at the latest after so long


async def engine_death(engines: Callable[[], Mapping[str, Any]]) -> EngineDeadError:
    """Waits until an engine has stopped, also while it has nothing to do.

    Args:
        engines: returns the `AsyncEngine`s that run now, all of which have been started, by what messages call them.

    Returns: an error for whoever started the server; its cause is the engine's, if an error stopped it.
    """
    while True:
        for name, engine in engines().items():
            try:
                engine.check_alive()
            except EngineDeadError as error:
                return _ended(name, error.__cause__)
        await asyncio.sleep(_LOOK_SECONDS)


def _ended(name: str, cause: BaseException | None) -> EngineDeadError:
    if cause is None:
        reason = "see its log"
    else:
        reason = str(cause) if isinstance(cause, DeepSeekOptimizerError) else f"{type(cause).__name__}: {cause}"
    error = EngineDeadError(f"the server has ended, since {name} stopped ({reason}); start it again")
    error.__cause__ = cause
    return error
