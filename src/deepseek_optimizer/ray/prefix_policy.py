"""Chooses the replica of a request: the one that knows the longest beginning of its prompt, unless it has too much to do."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Hashable, Iterable, Mapping
from hashlib import blake2b
from typing import Generic, TypeVar

from .routing_header import Routing

Replica = TypeVar("Replica", bound=Hashable)
_KEYS = 200_000  # that are remembered, of all replicas together: some 40 MB
_SESSIONS = 50_000


class PrefixPolicy(Generic[Replica]):
    """What each replica has been sent, and the choice that follows from it.

    A replica has too much to do if its load exceeds the mean, of this request and all others, by more than a factor `slack` and
    one request (consistent hashing with bounded loads, Mirrokni et al., https://arxiv.org/abs/1608.01350). Then the request
    goes to the next best one, which knows the prompt from then on.

    A request that stays goes to the one replica of its session whatever the load. Which one that is at first follows from the
    session alone, so that the policies of several proxies agree (rendezvous hashing).

    Args:
        slack: see above; at least 1.
        keys: maximum number of keys that are remembered; the least recently used are forgotten.
        sessions: the same for sessions, and for those with requests that stay.
    """

    def __init__(self, slack: float = 1.25, keys: int = _KEYS, sessions: int = _SESSIONS) -> None:
        if not slack >= 1:
            raise ValueError(f"slack must be at least 1, got {slack}")
        self._slack, self._max_keys, self._max_sessions = slack, keys, sessions
        self._known: OrderedDict[str, list[Replica]] = OrderedDict()  # key -> replicas, the last one to which it was sent last
        self._sessions: OrderedDict[str, Replica] = OrderedDict()
        self._homes: OrderedDict[str, Replica] = OrderedDict()  # of sessions with requests that stay
        self._last: dict[Replica, int] = {}  # number of the last request that each known replica was sent
        self._count = 0  # requests that were sent

    def rank(self, routing: Routing, loads: Mapping[Replica, int]) -> list[Replica]:
        """The replicas that may answer a request, the best one first.

        Args:
            routing: of the request.
            loads: requests that each replica has to answer.
        """
        if not loads:
            return []
        session, keys, stays = routing
        if session is not None and stays:
            home = self._homes.get(session)
            if home is None or home not in loads:
                home = max(loads, key=lambda replica: _weight(session, replica))
            return [home]
        limit = math.ceil(self._slack * (sum(loads.values()) + 1) / len(loads)) + 1
        depth = {replica: 0 for replica in loads}
        for length in range(len(keys), 0, -1):
            for replica in self._known.get(keys[length - 1], ()):
                if replica in depth and depth[replica] < length:
                    depth[replica] = length
        at = self._sessions.get(session) if session is not None else None

        def order(replica: Replica) -> tuple[bool, bool, int, int, int]:
            load, last = loads[replica], self._last.get(replica, 0)  # of equals, each in its turn
            return (load >= limit, replica != at, -depth[replica], load, last)

        return sorted(loads, key=order)

    def sent(self, routing: Routing, replica: Replica) -> None:
        """Remembers that a request was sent to a replica."""
        session, keys, stays = routing
        self._count += 1
        self._last[replica] = self._count
        for key in keys:
            replicas = self._known.setdefault(key, [])
            if replica in replicas:
                replicas.remove(replica)
            replicas.append(replica)
            self._known.move_to_end(key)
        while len(self._known) > self._max_keys:
            self._known.popitem(last=False)
        if session is not None:
            at = self._homes if stays else self._sessions
            at[session] = replica
            at.move_to_end(session)
            if len(at) > self._max_sessions:
                at.popitem(last=False)

    def keep(self, replicas: Iterable[Replica]) -> None:
        """Forgets all replicas but these. Ray calls it often, but replicas seldom go."""
        kept = set(replicas)
        if self._last.keys() <= kept:
            return
        self._last = {replica: last for replica, last in self._last.items() if replica in kept}
        for key, known in list(self._known.items()):
            known[:] = [replica for replica in known if replica in kept]
            if not known:
                del self._known[key]
        for at in (self._sessions, self._homes):
            for session, replica in list(at.items()):
                if replica not in kept:
                    del at[session]


def _weight(session: str, replica: object) -> bytes:
    return blake2b(f"{session} {replica}".encode(), digest_size=8).digest()
