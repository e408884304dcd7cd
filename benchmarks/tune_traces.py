"""Short traces for comparing settings: a second of requests that keeps two cores busy with a model of 135M parameters."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from deepseek_optimizer.tune.traces import Trace, TraceRequest


@dataclass(frozen=True)
class Case:
    """A trace, and what its settings are compared by.

    Attributes:
        make: the requests of so many seconds.
        goal: of `settings.GOALS`; with throughput, all requests are sent at once.
    """

    make: Callable[[float], Trace]
    goal: str


def bursty(seconds: float) -> Trace:
    """Chats that come in bursts, two a second, of five users each; a user's next prompt repeats the ones before."""
    rng, found, lengths = random.Random(0), [], [40] * 5
    for burst in range(max(1, round(2 * seconds))):
        for user, length in enumerate(lengths):
            new = rng.randint(8, 32)
            prompt = length + rng.randint(10, 50)
            found.append(TraceRequest(burst / 2 + rng.random() * 0.05, prompt, new, f"user {user}", length))
            lengths[user] = prompt + new
    return tuple(sorted(found, key=lambda request: request.at))


def agents(seconds: float) -> Trace:
    """Calls, eight a second, that share instructions of 600 tokens, with short answers."""
    rng = random.Random(0)
    found = [
        TraceRequest(rng.random() * seconds, 600 + rng.randint(20, 120), rng.randint(8, 24), "tools", 600)
        for _ in range(max(2, round(8 * seconds)))
    ]
    return tuple(sorted(found, key=lambda request: request.at))


def documents(seconds: float) -> Trace:
    """Documents of 200 to 500 tokens, three a second, with two questions about each."""
    rng, found = random.Random(0), []
    for document in range(max(1, round(3 * seconds))):
        length = rng.randint(200, 500)
        for _question in range(2):
            at = rng.random() * seconds
            found.append(TraceRequest(at, length + rng.randint(10, 40), rng.randint(16, 48), str(document), length))
    return tuple(sorted(found, key=lambda request: request.at))


CASES: Mapping[str, Case] = MappingProxyType(
    {"bursty": Case(bursty, "latency"), "agents": Case(agents, "latency"), "documents": Case(documents, "throughput")}
)
