"""The leader's side of a group: it starts steps in all processes, and notices when one of them ends.

Messages to the other processes go through the group, in one order for all. Answers, which no step needs, come through a pipe
or a connection per process.
"""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import Any, TypeVar

from ...errors import BackendError, RankLostError
from ...system.affinity import OnCpus
from ..cpu.group import Group
from .messages import DONE, END_BYTES, FAILED, LOST, READY, other_model, pickled, receive
from .uninterrupted import Uninterrupted

Result = TypeVar("Result")

_PATIENCE = 5.0  # seconds until a process that was told to end is killed


class Leader:
    """The other processes of a group, as rank 0 sees them. They end when this object does, and when its process does.

    Args:
        group: this process's place in the group, rank 0.
        processes: of ranks 1 and higher, which this one has started; () where others started them.
        answers: a pipe from each other rank.
        cpus: those that this process computes on; None: all that it may use.
    """

    def __init__(
        self,
        group: Group,
        processes: Sequence[subprocess.Popen[bytes]],
        answers: Sequence[Connection],
        cpus: Sequence[int] | None = None,
    ) -> None:
        self._cpus = cpus
        self.group, self._processes, self._answers = group, list(processes), list(answers)
        self._pid, self._lock = os.getpid(), threading.RLock()
        self._dropped: deque[int] = deque()  # numbers of stores that the others may free
        self._stores = 0
        self.ready = False  # whether the others have loaded their parts, and compiled their plans
        self._end: str | None = None  # which process has ended and how
        self._uninterrupted = Uninterrupted()
        ending = threading.Event()
        for rank, process in enumerate(self._processes, 1):
            threading.Thread(target=_watch, args=(group, rank, process, ending), daemon=True, name=f"dso-rank-{rank}").start()
        self.close = weakref.finalize(self, _close, self._pid, group, self._processes, self._answers, ending, self._lock)

    @property
    def pids(self) -> list[int]:
        """Process ids of the processes that this one has started."""
        return [process.pid for process in self._processes]

    def started(self, fingerprint: str = "") -> None:
        """Waits until all processes have loaded their parts of the model.

        Args:
            fingerprint: of the model, where processes read files of their own.

        Raises:
            BackendError: one of them could not; the message says why. Or it has another model.
        """
        for rank, answer in enumerate(self._answers, 1):
            try:
                what, text = receive(answer)
            except (EOFError, OSError):
                raise RankLostError(self._ended(rank)) from None
            if what != READY:
                raise BackendError(f"rank {rank} of {self.group.ranks} cannot load its part of the model: {text}")
            if text != fingerprint:
                raise BackendError(other_model(rank, self.group.ranks))
        self.ready = True

    def together(self, message: tuple[Any, ...], function: Callable[[], Result]) -> Result:
        """Sends a message to all other processes, calls `function`, which does here what the message says, and returns its
        result.

        Raises:
            RankLostError: a process has ended.
        """
        return self._in_order(message, function)

    def ask(self, message: tuple[Any, ...], function: Callable[[], Result]) -> list[Any]:
        """As `together`, for a message that the others answer; returns the results of all processes, by rank."""
        return self._in_order(message, lambda: [function(), *(self._answer(rank) for rank in range(1, self.group.ranks))])

    def check(self) -> None:
        """Raises RankLostError if a process has ended. Cheap."""
        if (rank := self.group.lost) is not None:
            raise RankLostError(self._ended(rank))

    def new_number(self) -> int:
        """A number for a store, which all processes know it by."""
        with self._lock:
            self._stores += 1
            return self._stores

    def drop(self, number: int) -> None:
        """The others free a store before the next message. May be called at any time, as by a finalizer."""
        self._dropped.append(number)

    def _in_order(self, message: tuple[Any, ...], function: Callable[[], Result]) -> Result:
        if os.getpid() != self._pid:
            raise BackendError("a model in several processes cannot be used after a fork; load it in the child")

        def both() -> Result:
            while self._dropped:
                self.group.send(pickled(("drop_store", self._dropped.popleft())))
            self.group.send(pickled(message))
            with OnCpus(self._cpus):
                return function()

        with self._lock:
            try:
                result, interrupt = self._uninterrupted.call(both)
            except RankLostError:
                raise RankLostError(self._ended(self.group.lost or 0)) from None
            except BaseException:
                self.group.lose(0)  # the others may be waiting for what will not come
                raise
        if interrupt is not None:
            raise interrupt
        return result

    def _answer(self, rank: int) -> Any:
        try:
            what, value = receive(self._answers[rank - 1])
        except (EOFError, OSError):
            raise RankLostError(self._ended(rank)) from None
        if what == LOST:
            raise RankLostError(self._ended(value))
        if what != DONE:
            raise RankLostError(f"rank {rank} of {self.group.ranks}: {value}")
        return value

    def _ended(self, rank: int) -> str:
        """Which process has ended and how; the first one that is asked for."""
        if self._end is None:
            self._end = self._how_ended(rank)
            self.group.lose(rank)  # the others end too, also those that wait for messages
        return self._end

    def _how_ended(self, rank: int) -> str:
        name = f"rank {rank} of {self.group.ranks}"
        if rank == 0:
            return f"{name}, the leader, " + ("could not finish a step" if self.close.alive else "has ended the others")
        if rank > len(self._processes):
            return self._connection_ended(rank)
        process = self._processes[rank - 1]
        try:
            code = process.wait(_PATIENCE)
        except subprocess.TimeoutExpired:
            return f"{name}, process {process.pid}, does not answer"
        what, text = self._last_words(rank, 0)
        if what == FAILED:
            return f"{name}, process {process.pid}: {text}"
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"
        return f"{name}, process {process.pid}, {how}"

    def _connection_ended(self, rank: int) -> str:
        """Why a process that others have started is not there: it may have ended because another one had."""
        asked = {0}
        while rank not in asked:
            asked.add(rank)
            what, value = self._last_words(rank, _PATIENCE)
            if what == FAILED:
                return f"rank {rank} of {self.group.ranks}: {value}"
            if what == LOST and value not in asked:
                rank = value
        return f"rank {rank} of {self.group.ranks}: the connection to it has ended"

    def _last_words(self, rank: int, patience: float) -> tuple[str, Any]:
        """What a process that has ended said of that."""
        answer = self._answers[rank - 1]
        try:
            while answer.poll(patience):
                what, value = receive(answer)
                if what in (FAILED, LOST):
                    return what, value
        except (EOFError, OSError):
            pass
        return "", None


def _watch(group: Group, rank: int, process: subprocess.Popen[bytes], ending: threading.Event) -> None:
    process.wait()
    if not ending.is_set():
        group.lose(rank)


def _close(
    pid: int,
    group: Group,
    processes: list[subprocess.Popen[bytes]],
    answers: list[Connection],
    ending: threading.Event,
    lock: Any,
) -> None:
    """Ends all processes and waits for them. What is called meanwhile or later raises RankLostError."""
    if os.getpid() != pid:
        return  # in a fork, whose parent goes on
    ending.set()
    held = lock.acquire(timeout=_PATIENCE)
    try:
        if not held:
            group.lose(0)  # ends the step that is running
        elif group.lost is None:
            group.send(END_BYTES)
    except RankLostError:
        pass
    finally:
        if held:
            lock.release()
    for process in processes:
        try:
            process.wait(_PATIENCE if held and group.lost is None else 0.5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    group.lose(0)  # nobody would answer
    for answer in answers:
        answer.close()
