"""Traces for comparing policies: 20 to 40 minutes of requests, generated, the same for the same seed."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType

from .traces import Trace, TraceRequest


def steady(seed: int = 0, seconds: float = 1200.0) -> Trace:
    """Chats at a steady rate; each turn repeats the ones before it, which are in the prefix cache."""
    rng, found = random.Random(seed), []
    for user, at in enumerate(_times(rng, seconds, 0.22)):
        length = 40
        for _turn in range(rng.randint(2, 6)):
            new = rng.randint(10, 60)
            found.append(TraceRequest(at, length + rng.randint(20, 100), new, f"user {user}", length))
            length = found[-1].prompt_tokens + new
            at += rng.uniform(4, 14)
    return _sorted(found)


def bursty(seed: int = 0, bursts: int = 80) -> Trace:
    """Quiet, and then many requests within a second."""
    rng, found = random.Random(seed), []
    for burst in range(bursts):
        for _ in range(rng.randint(8, 24)):
            found.append(TraceRequest(15 * burst + rng.random(), rng.randint(30, 300), rng.randint(10, 80)))
    return _sorted(found)


def diurnal(seed: int = 0, seconds: float = 1800.0, most: float = 1.1) -> Trace:
    """A day in half an hour: requests at random, from none at night to `most` per second at noon."""
    rng, found = random.Random(seed), []
    for at in _times(rng, seconds, most):
        if rng.random() < math.sin(math.pi * at / seconds) ** 2:
            found.append(TraceRequest(at, rng.randint(30, 400), rng.randint(10, 60)))
    return _sorted(found)


def agents(seed: int = 0, seconds: float = 2400.0) -> Trace:
    """Agents that call the model several times, with one of three long beginnings of instructions and tools."""
    rng, found = random.Random(seed), []
    for at in _times(rng, seconds, 0.15):
        tools = f"tools {rng.randrange(3)}"
        for _call in range(rng.randint(4, 10)):
            found.append(TraceRequest(at, 1500 + rng.randint(30, 300), rng.randint(8, 40), tools, 1500))
            at += rng.uniform(1, 5)
    return _sorted(found)


def documents(seed: int = 0, seconds: float = 1800.0) -> Trace:
    """Long documents, with one to three questions about each."""
    rng, found = random.Random(seed), []
    for document, at in enumerate(_times(rng, seconds, 0.12)):
        length = rng.randint(800, 3000)
        for _question in range(rng.randint(1, 3)):
            found.append(TraceRequest(at, length + rng.randint(10, 60), rng.randint(20, 100), f"document {document}", length))
            at += rng.uniform(8, 23)
    return _sorted(found)


def mixed(seed: int = 0, seconds: float = 1800.0) -> Trace:
    """Short chats, code and long texts; their drafts are accepted rarely, nearly always, and mostly."""
    rng, found = random.Random(seed), []
    for at in _times(rng, seconds, 0.4):
        kind = rng.random()
        if kind < 0.5:
            found.append(TraceRequest(at, rng.randint(30, 300), rng.randint(10, 80), accepted=0.2))
        elif kind < 0.85:
            found.append(TraceRequest(at, rng.randint(200, 600), rng.randint(60, 200), accepted=0.85))
        else:
            found.append(TraceRequest(at, rng.randint(1000, 3000), rng.randint(30, 100), accepted=0.6))
    return _sorted(found)


TRACES: Mapping[str, Callable[..., Trace]] = MappingProxyType(
    {"steady": steady, "bursty": bursty, "diurnal": diurnal, "agents": agents, "documents": documents, "mixed": mixed}
)


def _times(rng: random.Random, seconds: float, rate: float) -> list[float]:
    """Random times, `rate` per second on average."""
    found, at = [], rng.expovariate(rate)
    while at < seconds:
        found.append(at)
        at += rng.expovariate(rate)
    return found


def _sorted(requests: Iterable[TraceRequest]) -> Trace:
    return tuple(sorted(requests, key=lambda request: request.at))
