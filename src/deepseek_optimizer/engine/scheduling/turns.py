"""Fair sharing of batch places, cache blocks and prompt tokens among clients. Does not import torch.

Priorities come first. Among requests of one priority, the client with the fewest running requests is next; of several such
clients, the one whose last turn is longest ago; of its requests, the earliest. With a single client this is first come, first
served.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from heapq import heapify, heappop, heappush
from typing import Protocol, TypeVar

from ..request import Request
from ..running import Running

_REMEMBERED = 256  # number of clients to remember; more only while more of them have requests


class Queued(Protocol):
    """What the order of turns needs to know of a request in an engine; see `Running`."""

    number: int
    request: Request


Q = TypeVar("Q", bound=Queued)


class Turns:
    """Records the order of the clients' last turns."""

    def __init__(self) -> None:
        self._last: dict[str, int] = {}
        self._count = 0

    def last(self, client: str) -> int:
        """Returns the number of the client's last turn, which increases with every turn; 0: none is recorded."""
        return self._last.get(client, 0)

    def record(self, client: str, there: Iterable[Queued]) -> None:
        """Records a turn of a client.

        Args:
            client: the client.
            there: current requests; clients without any may be forgotten.
        """
        self._count += 1
        self._last[client] = self._count
        if len(self._last) > _REMEMBERED:
            clients = {r.request.client for r in there}
            self._last = {name: turn for name, turn in self._last.items() if name in clients}


def in_turn(waiting: Iterable[Running], running: Sequence[Running], turns: Turns) -> Iterator[Running]:
    """Yields waiting requests in the order in which to admit them.

    Args:
        waiting: waiting requests in scheduling order.
        running: running requests; read again for each item, so the caller adds an admitted request before it asks for the next.
        turns: turns of being admitted.
    """
    queues: dict[tuple[int, str], deque[Running]] = {}
    for r in waiting:
        queues.setdefault((r.request.priority, r.request.client), deque()).append(r)
    counts = _per_client(running)
    heads = [
        (priority, counts[client], turns.last(client), queue[0].number, client) for (priority, client), queue in queues.items()
    ]
    heapify(heads)
    while heads:
        priority, count, turn, number, client = heappop(heads)
        if (count, turn) != (counts[client], turns.last(client)):  # changed since: a place lost, or won in another priority
            heappush(heads, (priority, counts[client], turns.last(client), number, client))
            continue
        queue = queues[priority, client]
        yield queue.popleft()
        counts = _per_client(running)
        if queue:
            heappush(heads, (priority, counts[client], turns.last(client), queue[0].number, client))


def alternating(requests: Sequence[Q], turns: Turns) -> list[Q]:
    """Returns requests by priority, then round-robin over clients: the first request of each, then the second, and so on.

    Args:
        requests: requests in scheduling order.
        turns: turns of having a prompt processed.
    """
    seen = Counter[tuple[int, str]]()
    ranked = []
    for r in requests:
        owner = r.request.priority, r.request.client
        ranked.append((r.request.priority, seen[owner], turns.last(r.request.client), r.number, r))
        seen[owner] += 1
    return [r for *_, r in sorted(ranked, key=lambda entry: entry[:4])]


def first_to_yield(running: Sequence[Running]) -> Running:
    """Returns the request to preempt when blocks are short: of the lowest priority, the latest of the client that has the most.

    The earliest request of all is therefore preempted only if it runs alone, so it always makes progress.

    Args:
        running: running requests in scheduling order, at least one.
    """
    last = running[-1].request.priority
    of_last = [r for r in running if r.request.priority == last]
    counts = _per_client(of_last)
    return max(of_last, key=lambda r: (counts[r.request.client], r.number))


def place_for(newcomer: Running, running: Sequence[Running]) -> Running | None:
    """Returns the request to preempt so that a client without a place in the batch gets one.

    Args:
        newcomer: a waiting request.
        running: running requests in scheduling order.

    Returns: None if the newcomer's client has a place, or all other clients have only one or a better priority.
    """
    own = newcomer.request
    if any(r.request.client == own.client for r in running):
        return None
    others = [r for r in running if r.request.priority >= own.priority]
    counts = _per_client(others)
    others = [r for r in others if counts[r.request.client] > 1]
    return first_to_yield(others) if others else None


def _per_client(requests: Iterable[Running]) -> Counter[str]:
    return Counter(r.request.client for r in requests)
