"""The processes that run one model together: bytes from the leader to all others, and who has ended.

See `native/runtime/process_group.hpp`.
"""

from __future__ import annotations

import ctypes as C

from .native import Context, Handle, check, library

_HEADER = 8  # bytes before each message: its length


class Group:
    """This process's place in a group.

    Args:
        fd: a file in memory that all processes of the group share (`os.memfd_create`), empty when the first of them opens it.
        rank: of this process, from 0.
        ranks: number of processes.

    Raises:
        ValueError: rank or ranks is out of range.
        NotEnoughMemoryError: there is no memory to share.
    """

    def __init__(self, fd: int, rank: int, ranks: int) -> None:
        self.rank, self.ranks, self.lib = rank, ranks, library()
        self.handle = Handle(self.lib.dso_group_create, self.lib.dso_group_destroy, fd, rank, ranks)

    def join(self, context: Context) -> None:
        """Plans that are created on the context from now on belong to the group."""
        check(self.lib.dso_context_join(context.handle, self.handle))

    def send(self, message: bytes) -> None:
        """Sends a message to all others; of rank 0. Raises RankLostError."""
        data = len(message).to_bytes(_HEADER, "little") + message
        check(self.lib.dso_group_send(self.handle, data, len(data)))

    def receive(self) -> bytes:
        """Waits for the next message; of the others. Raises RankLostError."""
        return self._receive(int.from_bytes(self._receive(_HEADER), "little"))

    def _receive(self, size: int) -> bytes:
        data = C.create_string_buffer(size)
        check(self.lib.dso_group_receive(self.handle, data, size))
        return data.raw

    def lose(self, rank: int) -> None:
        """Says that a process has ended: what waits for it, and every later step, raises RankLostError."""
        check(self.lib.dso_group_lose(self.handle, rank))

    @property
    def lost(self) -> int | None:
        """The rank of the first process that has ended; None: none has."""
        rank = int(self.lib.dso_group_lost(self.handle))
        return None if rank < 0 else rank
