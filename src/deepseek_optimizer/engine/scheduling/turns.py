"""Whose turn it is: clients share the places of a batch, the cache and the prompts' tokens, whoever sends more. No torch.

Priorities come first. Among requests of one priority, the client with the fewest goes next, or else the one whose last turn is
longest ago, and of its own the earliest request; where there is one client, that is the order in which they came.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from heapq import heapify, heappop, heappush

from ..running import Running

_REMEMBERED = 256  # clients; more only while more of them are there


class Turns:
    """When each client had its last turn."""

    def __init__(self) -> None:
        self._last: dict[str, int] = {}
        self._count = 0

    def last(self, client: str) -> int:
        """A number that grows from turn to turn; 0: it had none that is remembered."""
        return self._last.get(client, 0)

    def had(self, client: str, there: Iterable[Running]) -> None:
        """A client has its turn now.

        Args:
            there: requests of all clients that are still to be remembered.
        """
        self._count += 1
        self._last[client] = self._count
        if len(self._last) > _REMEMBERED:
            clients = {one.request.client for one in there}
            self._last = {name: turn for name, turn in self._last.items() if name in clients}


def in_turn(waiting: Iterable[Running], running: Sequence[Running], turns: Turns) -> Iterator[Running]:
    """Those that wait, in the order in which they are to be taken in.

    Args:
        waiting: in order.
        running: looked at anew for each; whoever is taken in is there before the next is asked for.
        turns: of being taken in.
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
        if (count, turn) != (held[client], turns.last(client)):  # it has lost a place since, or got one for another priority
            heappush(heads, (priority, held[client], turns.last(client), number, client))
            continue
        queue = queues[priority, client]
        yield queue.popleft()
        held = _held(running)
        if queue:
            heappush(heads, (priority, held[client], turns.last(client), queue[0].number, client))


def alternating(requests: Sequence[Running], turns: Turns) -> list[Running]:
    """All clients' first ones, then their second ones, and so on; by priority first.

    Args:
        requests: in order.
        turns: of getting on.
    """
    seen = Counter[tuple[int, str]]()
    ranked = []
    for one in requests:
        owner = one.request.priority, one.request.client
        ranked.append((one.request.priority, seen[owner], turns.last(one.request.client), one.number, one))
        seen[owner] += 1
    return [one for *_, one in sorted(ranked, key=lambda entry: entry[:4])]


def first_to_yield(running: Sequence[Running]) -> Running:
    """Who gives up its blocks where there are too few: of the last priority, the latest of the client that has most. So the
    earliest of all never does unless it is alone, and always gets on.

    Args:
        running: in order, one at least.
    """
    last = running[-1].request.priority
    of_last = [one for one in running if one.request.priority == last]
    held = _held(of_last)
    return max(of_last, key=lambda one: (held[one.request.client], one.number))


def place_for(newcomer: Running, running: Sequence[Running]) -> Running | None:
    """Who gives up its place in the batch for a client that has none; None: nobody, since each client there has but one, or a
    better priority.

    Args:
        running: in order.
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
