"""Chooses the replica of a request: the one that knows the longest beginning of its prompt, unless it has too much to do."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Generic, TypeVar

Replica = TypeVar("Replica", bound=Hashable)
_KEYS = 200_000  # that are remembered, of all replicas together: some 40 MB
_SESSIONS = 50_000


class PrefixPolicy(Generic[Replica]):
    """What each replica has been sent, and the choice that follows from it.

    A replica has too much to do if its load exceeds the mean, of this request and all others, by more than a factor `slack` and
    one request (consistent hashing with bounded loads, Mirrokni et al., https://arxiv.org/abs/1608.01350). Then the request
    goes to the next best one, which knows the prompt from then on.

    Args:
        slack: see above; at least 1.
        keys: maximum number of keys that are remembered; the least recently used are forgotten.
        sessions: the same for sessions.
    """

    def __init__(self, slack: float = 1.25, keys: int = _KEYS, sessions: int = _SESSIONS) -> None:
        if not slack >= 1:
            raise ValueError(f"slack must be at least 1, got {slack}")
        self._slack, self._max_keys, self._max_sessions = slack, keys, sessions
        self._known: OrderedDict[str, list[Replica]] = OrderedDict()  # key -> replicas, the last one to which it was sent last
        self._sessions: OrderedDict[str, Replica] = OrderedDict()

    def rank(self, keys: Sequence[str], session: str | None, loads: Mapping[Replica, int]) -> list[Replica]:
        """All replicas, the best one for a request first.

        Args:
            keys: of the request's prompt, see `prefix_keys`.
            session: name of the session that the request belongs to; None: of none. It stays at its replica.
            loads: requests that each replica has to answer.
        """
        if not loads:
            return []
        limit = math.ceil(self._slack * (sum(loads.values()) + 1) / len(loads)) + 1
        depth = {replica: 0 for replica in loads}
        for length in range(len(keys), 0, -1):
            for replica in self._known.get(keys[length - 1], ()):
                if replica in depth and depth[replica] < length:
                    depth[replica] = length
        at = self._sessions.get(session) if session is not None else None

        def order(replica: Replica) -> tuple[bool, bool, int, int]:
            return (loads[replica] >= limit, replica != at, -depth[replica], loads[replica])

        return sorted(loads, key=order)

    def sent(self, keys: Sequence[str], session: str | None, replica: Replica) -> None:
        """Remembers that a request was sent to a replica."""
        for key in keys:
            replicas = self._known.setdefault(key, [])
            if replica in replicas:
                replicas.remove(replica)
            replicas.append(replica)
            self._known.move_to_end(key)
        while len(self._known) > self._max_keys:
            self._known.popitem(last=False)
        if session is not None:
            self._sessions[session] = replica
            self._sessions.move_to_end(session)
            if len(self._sessions) > self._max_sessions:
                self._sessions.popitem(last=False)

    def keep(self, replicas: Iterable[Replica]) -> None:
        """Forgets all replicas but these."""
        kept = set(replicas)
        for key, known in list(self._known.items()):
            known[:] = [replica for replica in known if replica in kept]
            if not known:
                del self._known[key]
        for session, replica in list(self._sessions.items()):
            if replica not in kept:
                del self._sessions[session]
