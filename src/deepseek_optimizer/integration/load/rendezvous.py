"""How the processes of a model on several machines find each other: by the environment variables that torchrun sets.

These are RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT, which may be set by hand too, and LOCAL_RANK and LOCAL_WORLD_SIZE
where a machine has several processes. Process 0 publishes its port in a `TCPStore`, and the others connect to it.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

from ...errors import BackendError, ConfigError
from ...system.attempt_store import store_of_attempt
from . import proven_links
from .proven_links import connect, listen, meet

_PORT = "dso/port"  # the key of process 0's port


@dataclass(frozen=True)
class Place:
    """This process's place among those of several machines.

    Attributes:
        rank, ranks: its number, and how many there are.
        address, port: of process 0, for the rendezvous.
        key: the secret that all processes know.
        hosted: whether torchrun keeps the store of the rendezvous, also while it restarts processes.
        here: which of the processes on this machine this one is, and how many they are.
    """

    rank: int
    ranks: int
    address: str
    port: int
    key: bytes
    hosted: bool
    here: tuple[int, int] = (0, 1)

    @classmethod
    def of_environment(cls) -> Place | None:
        """As the environment says; None: this process was not started as one of several.

        Raises:
            ConfigError: a variable is missing or invalid.
        """
        found = {name: os.environ.get(name, "") for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")}
        if not found["RANK"] or found["WORLD_SIZE"] in ("", "1"):
            return None
        try:
            rank, ranks, port = (int(found[name]) for name in ("RANK", "WORLD_SIZE", "MASTER_PORT"))
        except ValueError:
            rank, ranks, port = -1, 0, 0
        if not 0 <= rank < ranks or not 0 < port < 1 << 16 or not found["MASTER_ADDR"]:
            raise ConfigError(
                "several machines: RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT must be set, as torchrun sets them; got "
                + ", ".join(f"{name}={value!r}" for name, value in found.items())
            )
        key = os.environ.get("DSO_RANK_KEY", "")
        if len(key) < 16:
            raise ConfigError(
                "several machines: DSO_RANK_KEY must be the same secret of at least 16 characters on all of them: without it, "
                "anybody who reaches their ports could run code there"
            )
        hosted = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        return cls(rank, ranks, found["MASTER_ADDR"], port, key.encode(), hosted, _here(ranks))

    def accept(self) -> list[Connection]:
        """Connections to ranks 1 and higher; of rank 0.

        Raises:
            BackendError: not all of them have connected in time.
        """
        names = {str(rank): rank for rank in range(1, self.ranks)}
        try:
            with listen(self.address) as server:
                store = self._store()
                store.set(_PORT, str(server.getsockname()[1]))
                found = meet(server, self.key, names)
        except (OSError, RuntimeError) as error:
            raise BackendError(f"several machines: rank 0 at {self.address} cannot meet the others: {error}") from error
        del store
        return [found[name] for name in names]

    def connect(self) -> Connection:
        """The connection to rank 0; of the others.

        Raises:
            BackendError: it cannot be reached in time, or has another key.
        """
        try:
            return connect((self.address, int(self._store().get(_PORT))), self.key, str(self.rank))
        except (OSError, RuntimeError) as error:
            raise BackendError(
                f"several machines: rank {self.rank} cannot reach rank 0 at {self.address}, or it has another DSO_RANK_KEY: "
                f"{error}"
            ) from error

    def _store(self) -> Any:
        from torch.distributed import TCPStore

        own, patience = self.rank == 0 and not self.hosted, proven_links.PATIENCE
        store = TCPStore(self.address, self.port, is_master=own, timeout=timedelta(seconds=patience), wait_for_workers=False)
        return store_of_attempt(store, self.rank, self.ranks, patience) if self.hosted else store


def _here(ranks: int) -> tuple[int, int]:
    """See `Place.here`; as torchrun says, which sets these variables if it starts several processes on a machine."""
    index, count = os.environ.get("LOCAL_RANK") or "0", os.environ.get("LOCAL_WORLD_SIZE") or "1"
    if not (index.isdecimal() and count.isdecimal() and int(index) < int(count) <= ranks):
        raise ConfigError(
            "several machines: LOCAL_RANK and LOCAL_WORLD_SIZE must be set as torchrun sets them, or not at all; got "
            f"LOCAL_RANK={index!r} and LOCAL_WORLD_SIZE={count!r} of {ranks} processes"
        )
    return int(index), int(count)
