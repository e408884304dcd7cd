"""What the proxy tells the router about a request. It travels as Ray's session id, the only part of an HTTP request that Ray
hands to a router."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple
from urllib.parse import quote, unquote

_MARK = "dso:"


class Routing(NamedTuple):
    """How a request is routed.

    Attributes:
        session: that it belongs to; None: it belongs to none.
        keys: of its prompt, see `prefix_keys`.
    """

    session: str | None
    keys: list[str]


def write(session: str | None, keys: Sequence[str]) -> str:
    """The session id of a request, in ASCII."""
    return f"{_MARK}{'' if session is None else quote(session, safe='')}:{','.join(keys)}"


def read(session_id: str) -> Routing:
    """What `write` wrote; another session id is one that a client sent to a proxy without `middlewares`."""
    if not session_id.startswith(_MARK):
        return Routing(session_id or None, [])
    session, _, keys = session_id.removeprefix(_MARK).partition(":")
    return Routing(unquote(session) or None, keys.split(",") if keys else [])
