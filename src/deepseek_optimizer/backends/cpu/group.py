"""The processes that run one model together: bytes from the leader to all others, the exchange of rows between plans, and who
has ended.

See `native/runtime/process_group.hpp`.
"""

from __future__ import annotations

import ctypes as C
import os
import socket
from abc import ABC, abstractmethod
from collections.abc import Sequence
from multiprocessing.connection import Connection
from typing import Any

from ...errors import RankLostError
from .native import Context, Handle, check, library

_HEADER = 8  # bytes before each message in shared memory: its length


class Group(ABC):
    """This process's place in a group.

    Args:
        rank: of this process, from 0.
        ranks: number of processes.
        here: which of the processes on this machine this one is, from 0, and how many they are.
        create, arguments: the library's function that creates the group, and its arguments.

    Raises:
        ValueError: rank or ranks is out of range.
    """

    def __init__(self, rank: int, ranks: int, here: tuple[int, int], create: str, *arguments: Any) -> None:
        self.rank, self.ranks, self.lib = rank, ranks, library()
        self.index_here, self.ranks_here = here
        self.handle = Handle(getattr(self.lib, create), self.lib.dso_group_destroy, *arguments, rank, ranks)

    def join(self, context: Context) -> None:
        """Plans that are created on the context from now on belong to the group."""
        check(self.lib.dso_context_join(context.handle, self.handle))

    @abstractmethod
    def send(self, message: bytes) -> None:
        """Sends a message to all others; of rank 0. Raises RankLostError."""

    @abstractmethod
    def receive(self) -> bytes:
        """Waits for the next message; of the others. Raises RankLostError."""

    def lose(self, rank: int) -> None:
        """Says that a process has ended: what waits for it, and every later step, raises RankLostError."""
        check(self.lib.dso_group_lose(self.handle, rank))

    @property
    def lost(self) -> int | None:
        """The rank of the first process that has ended; None: none has."""
        rank = int(self.lib.dso_group_lost(self.handle))
        return None if rank < 0 else rank


class SharedGroup(Group):
    """A group on one machine, which shares memory.

    Args:
        fd: a file in memory that all processes of the group share (`os.memfd_create`), empty when the first of them opens it.
        rank, ranks: as for `Group`.

    Raises:
        ValueError: rank or ranks is out of range.
        NotEnoughMemoryError: there is no memory to share.
    """

    def __init__(self, fd: int, rank: int, ranks: int) -> None:
        super().__init__(rank, ranks, (rank, ranks), "dso_group_create", fd)

    def send(self, message: bytes) -> None:
        """See `Group.send`."""
        data = len(message).to_bytes(_HEADER, "little") + message
        check(self.lib.dso_group_send(self.handle, data, len(data)))

    def receive(self) -> bytes:
        """See `Group.receive`."""
        return self._receive(int.from_bytes(self._receive(_HEADER), "little"))

    def _receive(self, size: int) -> bytes:
        data = C.create_string_buffer(size)
        check(self.lib.dso_group_receive(self.handle, data, size))
        return data.raw


class ConnectedGroup(Group):
    """A group over several machines, whose processes are connected.

    Args:
        rank, ranks: as for `Group`.
        rows: a connection to each other rank, by rank, for the rows that plans exchange. This call closes it: the library has a
            duplicate.
        alive: one more to each of them, whose failure tells that its machine is gone. Those between rank 0 and the others also
            carry messages and answers; this call closes the rest.
        here: as for `Group`.
    """

    def __init__(
        self, rank: int, ranks: int, rows: dict[int, Connection], alive: dict[int, Connection], here: tuple[int, int]
    ) -> None:
        numbers = ((C.c_int32 * ranks)(*(-1 if k == rank else of[k].fileno() for k in range(ranks))) for of in (rows, alive))
        super().__init__(rank, ranks, here, "dso_group_connect", *numbers)
        for link in (*rows.values(), *(link for other, link in alive.items() if 0 not in (rank, other))):
            link.close()
        self._links = [alive[other] for other in (range(1, ranks) if rank == 0 else (0,))]

    @property
    def links(self) -> Sequence[Connection]:
        """Of rank 0 the connections to the others, in their order; of the others that to rank 0."""
        return self._links

    def send(self, message: bytes) -> None:
        """See `Group.send`."""
        for rank, link in enumerate(self._links, 1):
            try:
                link.send_bytes(message)
            except OSError:
                self.lose(rank)
                raise RankLostError(f"rank {rank} of {self.ranks}") from None

    def receive(self) -> bytes:
        """See `Group.receive`."""
        try:
            return self._links[0].recv_bytes()
        except (EOFError, OSError):
            raise RankLostError(f"rank 0 of {self.ranks}") from None

    def lose(self, rank: int) -> None:
        """See `Group.lose`. The others find no more messages; what they have sent can still be read."""
        super().lose(rank)
        if self.rank == 0:
            for link in self._links:
                _send_no_more(link)


def _send_no_more(link: Connection) -> None:
    try:
        with socket.socket(fileno=os.dup(link.fileno())) as connected:
            connected.shutdown(socket.SHUT_WR)
    except OSError:  # it is closed, or has ended
        pass
