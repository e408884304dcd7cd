"""Which requests end before their work is done. Does not import torch."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol, TypeVar

from .request import Finish, Request


class Waiting(Protocol):
    """State of a request in an engine. `cancelled`: whether its caller gave it up."""

    request: Request
    cancelled: bool


R = TypeVar("R", bound=Waiting)


def ended_early(requests: Iterable[R], now: float) -> list[tuple[R, Finish]]:
    """The requests that were cancelled or are past their deadline, and how they end.

    Args:
        requests: of an engine.
        now: by the engine's clock, in seconds.
    """
    ended: list[tuple[R, Finish]] = []
    for r in requests:
        if r.cancelled:
            ended.append((r, "cancelled"))
        elif r.request.deadline is not None and now >= r.request.deadline:
            ended.append((r, "deadline"))
    return ended
