"""Torch's threads beside those of the native backend."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_lock = threading.Lock()
_users: list[int] = []  # what each of those who are at it found; the process has one number of threads, so they share this


@contextmanager
def one_torch_thread() -> Iterator[None]:
    """The products run on the backend's threads: torch's own, which spin for a while after each operation, would take their
    cores from them at each change of hands. On two cores: 31 s for 1,024 tokens of SmolLM2 through its modules instead of 1.1;
    a step of 13 ms instead of 8.5 where logits of 102,400 tokens are processed.

    Several threads may be in it at once: each leaves the number that the first one found.
    """
    with _lock:
        # asked for in any case: a thread takes the process's number over at its first question, which were it to come after
        # `set_num_threads` could be what another has put back meanwhile
        here = torch.get_num_threads()
        _users.append(_users[0] if _users else here)
        found = _users[-1]
        torch.set_num_threads(1)
    try:
        yield
    finally:
        with _lock:
            _users.pop()
            torch.set_num_threads(found)
