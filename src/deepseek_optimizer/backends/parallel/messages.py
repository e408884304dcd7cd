"""Messages between the leader and the other processes of a group."""

from __future__ import annotations

import io
import os
import pickle
import socket
from multiprocessing.connection import Connection
from typing import Any

import torch

END = "end"  # the message after which a process ends
END_BYTES = pickle.dumps((END,))
READY, DONE, FAILED = "ready", "done", "failed"  # kinds of answers
LOST = "lost"  # the kind of an answer that names the rank whose process has ended


class _Pickler(pickle.Pickler):
    """Tensors go as arrays of numpy: torch would write each as a file of its own, which takes several times as long."""

    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor) and value.device.type == "cpu" and value.dtype == torch.float32:
            return torch.from_numpy, (value.detach().numpy(),)
        return NotImplemented


def pickled(message: Any) -> bytes:
    """A message in bytes, tensors by value: the pipe's own `send` would share their memory."""
    file = io.BytesIO()
    _Pickler(file, pickle.HIGHEST_PROTOCOL).dump(message)
    return file.getvalue()


def answer(pipe: Connection, kind: str, value: Any) -> None:
    """Sends an answer."""
    pipe.send_bytes(pickled((kind, value)))


def receive(pipe: Connection) -> tuple[str, Any]:
    """The next answer: its kind and its value. Raises EOFError if the other process has ended."""
    try:
        kind, value = pickle.loads(pipe.recv_bytes())  # noqa: S301  # from a process that this one has started
    except ConnectionResetError:
        raise EOFError from None
    return kind, value


def has_ended(pipe: Connection) -> bool:
    """Whether the other process has ended, and everything that it has sent is read. Reads nothing."""
    try:
        with socket.socket(fileno=os.dup(pipe.fileno())) as connected:
            return connected.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT) == b""
    except BlockingIOError:
        return False
    except OSError:
        return True


def other_model(rank: int, ranks: int) -> str:
    """What an error says of a process whose fingerprint of the model is another one."""
    return f"rank {rank} of {ranks} has loaded another model, or with other settings; use the same in all of them"
