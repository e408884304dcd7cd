"""Limits torch's threads while the native backend's threads run."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_lock = threading.Lock()
_users: list[int] = []  # number of threads to restore, for each active context; the setting is process-wide


@contextmanager
def one_torch_thread() -> Iterator[None]:
    """Sets torch to one thread within the context.

    Matrix products run on the backend's threads. Torch's threads, which spin for a while after each operation, would compete
    with them for the cores. On two cores without this: 31 s instead of 1.1 s for 1,024 tokens of SmolLM2 through its modules; a
    step of 13 ms instead of 8.5 ms when logits of 102,400 tokens are processed.

    Several threads may be in the context at once; each restores the number of threads from before the first one entered.
    """
    with _lock:
        # Always read: a thread adopts the process's number at its first read. If that came after `set_num_threads`, it could
        # be a number that another thread has restored meanwhile.
        current = torch.get_num_threads()
        _users.append(_users[0] if _users else current)
        before = _users[-1]
        torch.set_num_threads(1)
    try:
        yield
    finally:
        with _lock:
            _users.pop()
            torch.set_num_threads(before)
