"""What the proxy tells the router about a request. It travels as Ray's session id, the only part of an HTTP request that Ray
hands to a router."""

from __future__ import annotations

import hashlib
from typing import NamedTuple

_MARK = "dso:"
_STAYS, _PREFERS = "stays", "prefers"


class Routing(NamedTuple):
    """How a request is routed.

    Attributes:
        session: hash of the session that it belongs to; None: it belongs to none.
        keys: of its prompt, see `prefix_keys`.
        stays: whether only the session's replica can answer it, since that has what it names.
    """

    session: str | None
    keys: list[str]
    stays: bool = False


def session_of(text: str) -> str:
    """The hash of what identifies a session: that may be an API key, and Ray logs session ids. It is short however long `text`
    is, so that clients cannot fill the router's memory."""
    return hashlib.blake2b(text.encode(errors="surrogateescape"), digest_size=16).hexdigest()


def write(routing: Routing) -> str:
    """The session id of a request, in ASCII."""
    return f"{_MARK}{_STAYS if routing.stays else _PREFERS}:{routing.session or ''}:{','.join(routing.keys)}"


def read(session_id: str) -> Routing:
    """What `write` wrote; another session id is one that a client sent to a proxy without `middlewares`."""
    mark, _, written = session_id.partition(":")
    how, _, rest = written.partition(":")
    session, separator, keys = rest.partition(":")
    if f"{mark}:" != _MARK or how not in (_STAYS, _PREFERS) or not separator:
        return Routing(session_of(session_id) if session_id else None, [])
    return Routing(session or None, keys.split(",") if keys else [], how == _STAYS)
