"""Connections between the leader of a pipeline and its other processes: messages in order, and errors when one has ended.

A message is a pickled tuple. Both ends belong to one group, which is started as one, or have proved that they know its secret.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import threading
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import Any, NoReturn, TypeVar

import torch

from ...errors import BackendError, RankLostError
from .messages import DONE, END_BYTES, FAILED, READY, has_ended, other_model, pickled, receive
from .uninterrupted import Uninterrupted

Result = TypeVar("Result")

_PATIENCE = 5.0  # seconds until a process that was told to end is killed


class Links:
    """The other processes of a pipeline, as rank 0 sees them. They end when this object does, and when its process does.

    Args:
        connections: to ranks 1 and higher.
        processes: those of them that this process has started; () where others started them.
    """

    def __init__(self, connections: Sequence[Connection], processes: Sequence[subprocess.Popen[bytes]] = ()) -> None:
        self.ranks = 1 + len(connections)
        self.ready = False  # whether the others have loaded their parts, and compiled their plans
        self.lock = threading.RLock()  # held from a message to its answer
        self._connections, self._processes, self._pid = list(connections), list(processes), os.getpid()
        self._lost: list[str] = []  # which process has ended first, and how
        self._dropped: deque[int] = deque()  # numbers of stores that the others may free
        self._numbers, self._uninterrupted = 0, Uninterrupted()
        self.close = weakref.finalize(self, _close, self._pid, self._connections, self._processes, self._lost, self.lock)

    @property
    def pids(self) -> list[int]:
        """Process ids of the processes that this one has started."""
        return [process.pid for process in self._processes]

    def new_number(self) -> int:
        """A number for a store, which all processes know it by."""
        with self.lock:
            self._numbers += 1
            return self._numbers

    def drop(self, number: int) -> None:
        """The others free a store before the next message. May be called at any time, as by a finalizer."""
        self._dropped.append(number)

    def started(self, fingerprint: str = "") -> None:
        """Waits until all processes have loaded their parts of the model.

        Args:
            fingerprint: of the model and its division.

        Raises:
            BackendError: one of them could not; the message says why. Or it has another model, or divides it in another way.
        """
        for rank in range(1, self.ranks):
            what, text = self._receive(rank)
            if what != READY:
                raise BackendError(f"rank {rank} of {self.ranks} cannot load its part of the model: {text}")
            if text != fingerprint:
                raise BackendError(other_model(rank, self.ranks))
        self.ready = True

    def together(self, function: Callable[[], Result]) -> Result:
        """Calls a function that exchanges messages: no others come between, and Ctrl-C does not interrupt it."""

        def alone() -> Result:
            with self.lock:
                while self._dropped:
                    number = self._dropped.popleft()
                    for rank in range(1, self.ranks):
                        self.send(rank, "drop_store", number)
                return function()

        result, interrupt = self._uninterrupted.call(alone)
        if interrupt is not None:
            raise interrupt
        return result

    def send(self, rank: int, *message: Any) -> None:
        """Sends a message, which is not answered; within `together`, since a long one is sent in several parts.

        Raises:
            RankLostError: a process has ended.
        """
        self._check_usable()
        try:
            self._connections[rank - 1].send_bytes(pickled(message))
        except OSError:
            self._lose(rank)

    def send_rows(self, rank: int, rows: torch.Tensor | None) -> None:
        """Sends the hidden rows, float32 [T, H], of the step of the last message; None: the step is not run, nor answered.

        Raises:
            RankLostError: a process has ended.
        """
        self._check_usable()
        try:
            self._connections[rank - 1].send_bytes(b"" if rows is None else rows.contiguous().numpy().data.cast("B"))
        except OSError:
            self._lose(rank)

    def ask(self, rank: int, *message: Any) -> Any:
        """Sends a message and returns its answer; within `together`.

        Raises:
            RankLostError: a process has ended, before or meanwhile.
        """
        self.send(rank, *message)
        return self.answer(rank)

    def answer(self, rank: int) -> Any:
        """The answer to a message that was sent.

        Raises:
            RankLostError: the process has ended, or could not do what the message said.
        """
        what, value = self._receive(rank)
        if what != DONE:
            self._fail(rank, value)
        return value

    def failed(self, rank: int) -> NoReturn:
        """Raises RankLostError for a process that has ended, or could not do what the last message said."""
        self._fail(rank, self._receive(rank)[1])

    @property
    def sockets(self) -> list[int]:
        """The file descriptors of the connections to ranks 1 and higher; for use within `together`."""
        return [connection.fileno() for connection in self._connections]

    def check(self) -> None:
        """Raises RankLostError if a process has ended. Cheap."""
        self._check_usable()
        for rank, process in enumerate(self._processes, 1):
            if process.poll() is not None:
                self._lose(rank)
        for rank in range(1 + len(self._processes), self.ranks):
            if has_ended(self._connections[rank - 1]):
                self._lose(rank)

    def _receive(self, rank: int) -> tuple[str, Any]:
        try:
            return receive(self._connections[rank - 1])
        except (EOFError, OSError):
            self._lose(rank)
        raise AssertionError  # `_lose` raises

    def _check_usable(self) -> None:
        if os.getpid() != self._pid:
            raise BackendError("a model in several processes cannot be used after a fork; load it in the child")
        if self._lost:
            raise RankLostError(self._lost[0])
        if not self.close.alive:
            raise RankLostError(self._closed)

    @property
    def _closed(self) -> str:
        return f"rank 0 of {self.ranks}, the leader, has ended the others"

    def _lose(self, rank: int) -> NoReturn:
        if not self.close.alive:  # by another thread, while this one waited
            self._end(self._closed)
        name = f"rank {rank} of {self.ranks}"
        if rank > len(self._processes):
            self._end(f"{name}: the connection to it has ended")
        process = self._processes[rank - 1]
        try:
            code = process.wait(_PATIENCE)
        except subprocess.TimeoutExpired:
            self._end(f"{name}, process {process.pid}, does not answer")
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"
        self._end(f"{name}, process {process.pid}, {self._reason(rank) or how}")

    def _reason(self, rank: int) -> str | None:
        """What a process that has ended said last."""
        connection = self._connections[rank - 1]
        try:
            while connection.poll():
                what, text = receive(connection)
                if what == FAILED:
                    return str(text)
        except (EOFError, OSError):
            pass
        return None

    def _fail(self, rank: int, reason: Any) -> NoReturn:
        self._end(f"rank {rank} of {self.ranks}: {reason}")

    def _end(self, how: str) -> NoReturn:
        """All requests end, and the other processes too."""
        if not self._lost:
            self._lost.append(how)
        self.close()
        raise RankLostError(self._lost[0])


def _close(
    pid: int, connections: list[Connection], processes: list[subprocess.Popen[bytes]], lost: list[str], lock: Any
) -> None:
    """Ends all processes and waits for them. What is called meanwhile or later raises RankLostError."""
    if os.getpid() != pid:
        return  # in a fork, whose parent goes on
    held = lock.acquire(timeout=_PATIENCE)
    try:
        for connection in connections:
            if held:
                _say_end(connection)
            else:
                _cut(connection)
    finally:
        if held:
            lock.release()
    for process in processes:
        try:
            process.wait(_PATIENCE if held and not lost else 0.5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _say_end(connection: Connection) -> None:
    try:
        connection.send_bytes(END_BYTES)
    except OSError:
        pass
    connection.close()  # they also end without a message


def _cut(connection: Connection) -> None:
    """Ends a connection that another thread uses, which may have sent a message in part. Closing it would let another file
    get its number while that thread reads."""
    try:
        with socket.socket(fileno=os.dup(connection.fileno())) as used:
            used.shutdown(socket.SHUT_RDWR)
    except OSError:
        pass
