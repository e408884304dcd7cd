"""Fair sharing of batch places, cache blocks and prompt tokens among clients. Does not import torch.

Priorities come first. Among requests of one priority, the client with the fewest running requests is next; of several such
clients, the one whose last turn is longest ago; of its requests, the earliest. With a single client this is first come, first
served.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from heapq import heapify, heappop, heappush

from ..running import Running

_REMEMBERED = 256  # number of clients to remember; more only while more of them have requests


class Turns:
    """Records the order of the clients' last turns."""

    def __init__(self) -> None:
        self._last: dict[str, int] = {}
        self._count = 0

    def last(self, client: str) -> int:
        """Returns the number of the client's last turn, which increases with every turn; 0: none is recorded."""
        return self._last.get(client, 0)

    def record(self, client: str, there: Iterable[Running]) -> None:
        """Records a turn of a client.

        Args:
            client: the client.
            there: current requests; clients without any may be forgotten.
        """
        self._count += 1
        self._last[client] = self._count
        if len(self._last) > _REMEMBERED:
            clients = {one.request.client for one in there}
            self._last = {name: turn for name, turn in self._last.items() if name in clients}


def in_turn(waiting: Iterable[Running], running: Sequence[Running], turns: Turns) -> Iterator[Running]:
    """Yields waiting requests in the order in which to admit them.

    Args:
        waiting: waiting requests in scheduling order.
        running: running requests; read again for each item, so the caller adds an admitted request before it asks for the next.
        turns: turns of being admitted.
    """
    queues: dict[tuple[int, str], deque[Running]] = {}
    for one in waiting:
        queues.setdefault((one.request.priority, one.request.client), deque()).append(one)
    held = _held(running)
    heads = [
        (priority, held[client], turns.last(client), queue[0].number, client) for (priority, client), queue in queues.items()
    ]
    heapify(heads)
    while heads:
        priority, count, turn, number, client = heappop(heads)
        if (count, turn) != (held[client], turns.last(client)):  # changed since: a place lost, or won in another priority
            heappush(heads, (priority, held[client], turns.last(client), number, client))
            continue
        queue = queues[priority, client]
        yield queue.popleft()
        held = _held(running)
        if queue:
            heappush(heads, (priority, held[client], turns.last(client), queue[0].number, client))


def alternating(requests: Sequence[Running], turns: Turns) -> list[Running]:
    """Returns requests by priority, then round-robin over clients: the first request of each, then the second, and so on.

    Args:
        requests: requests in scheduling order.
        turns: turns of having a prompt processed.
    """
    seen = Counter[tuple[int, str]]()
    ranked = []
    for one in requests:
        owner = one.request.priority, one.request.client
        ranked.append((one.request.priority, seen[owner], turns.last(one.request.client), one.number, one))
        seen[owner] += 1
    return [one for *_, one in sorted(ranked, key=lambda entry: entry[:4])]


def first_to_yield(running: Sequence[Running]) -> Running:
    """Returns the request to preempt when blocks are short: of the lowest priority, the latest of the client that has the most.

    The earliest request of all is therefore preempted only if it runs alone, so it always makes progress.

    Args:
        running: running requests in scheduling order, at least one.
    """
    last = running[-1].request.priority
    of_last = [one for one in running if one.request.priority == last]
    held = _held(of_last)
    return max(of_last, key=lambda one: (held[one.request.client], one.number))


def place_for(newcomer: Running, running: Sequence[Running]) -> Running | None:
    """Returns the request to preempt so that a client without a place in the batch gets one.

    Args:
        newcomer: a waiting request.
        running: running requests in scheduling order.

    Returns: None if the newcomer's client has a place, or all other clients have only one or a better priority.
    """
    own = newcomer.request
    if any(one.request.client == own.client for one in running):
        return None
    others = [one for one in running if one.request.priority >= own.priority]
    held = _held(others)
    others = [one for one in others if held[one.request.client] > 1]
    return first_to_yield(others) if others else None


def _held(requests: Iterable[Running]) -> Counter[str]:
    return Counter(one.request.client for one in requests)
