"""Messages between the leader and the other processes of a group."""

from __future__ import annotations

import pickle
from multiprocessing.connection import Connection
from typing import Any

END = "end"  # the message after which a process ends
READY, DONE, FAILED = "ready", "done", "failed"  # kinds of answers


def answer(pipe: Connection, kind: str, value: Any) -> None:
    """Sends an answer, tensors by value: the pipe's own `send` would share their memory."""
    pipe.send_bytes(pickle.dumps((kind, value)))


def receive(pipe: Connection) -> tuple[str, Any]:
    """The next answer: its kind and its value. Raises EOFError if the other process has ended."""
    try:
        kind, value = pickle.loads(pipe.recv_bytes())  # noqa: S301  # from a process that this one has started
    except ConnectionResetError:
        raise EOFError from None
    return kind, value
