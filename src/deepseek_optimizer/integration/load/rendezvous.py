"""How the processes of a pipeline on several machines find each other: by the environment variables that torchrun sets.

These are RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT, which may be set by hand too. Process 0 publishes its port in a
`TCPStore`, and the others connect to it. Messages are pickled, so both sides prove first that they know DSO_RANK_KEY. Nothing
is encrypted.
"""

from __future__ import annotations

import ipaddress
import os
import queue
import socket
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing import AuthenticationError
from multiprocessing.connection import Connection, answer_challenge, deliver_challenge
from typing import Any

from ...errors import BackendError, ConfigError
from ...system.attempt_store import store_of_attempt

_PORT = "dso/port"  # the key of process 0's port
PATIENCE = 600.0  # seconds until all processes have connected
_HANDSHAKE = 10  # seconds
_LOOK = 0.05  # seconds between looks for processes that have proved who they are
_DEAD_AFTER = 20  # seconds without a sign of life of the other machine


@dataclass(frozen=True)
class Place:
    """This process's place among those of several machines.

    Attributes:
        rank, ranks: its number, and how many there are.
        address, port: of process 0, for the rendezvous.
        key: the secret that all processes know.
        hosted: whether torchrun keeps the store of the rendezvous, also while it restarts processes.
    """

    rank: int
    ranks: int
    address: str
    port: int
    key: bytes
    hosted: bool

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
        return cls(rank, ranks, found["MASTER_ADDR"], port, key.encode(), hosted)

    def accept(self) -> list[Connection]:
        """Connections to ranks 1 and higher; of rank 0.

        Raises:
            BackendError: not all of them have connected in time.
        """
        try:
            with socket.create_server((_bound(self.address), 0), family=_family(self.address)) as server:
                store = self._store()
                store.set(_PORT, str(server.getsockname()[1]))
                found = self._meet(server)
        except (OSError, RuntimeError) as error:
            raise BackendError(f"several machines: rank 0 at {self.address} cannot meet the others: {error}") from error
        del store
        return [found[rank] for rank in range(1, self.ranks)]

    def connect(self) -> Connection:
        """The connection to rank 0; of the others.

        Raises:
            BackendError: it cannot be reached in time, or has another key.
        """
        try:
            port = int(self._store().get(_PORT))
            connected = socket.create_connection((self.address, port), timeout=_HANDSHAKE)
            link = _link(connected, int(PATIENCE))  # rank 0 may have other things to do first
            answer_challenge(link, self.key)
            deliver_challenge(link, self.key)
            link.send_bytes(str(self.rank).encode())
        except (OSError, EOFError, RuntimeError, AuthenticationError, AssertionError) as error:
            raise BackendError(
                f"several machines: rank {self.rank} cannot reach rank 0 at {self.address}, or it has another DSO_RANK_KEY: "
                f"{error}"
            ) from error
        return _patient(link)

    def _store(self) -> Any:
        from torch.distributed import TCPStore

        own = self.rank == 0 and not self.hosted
        store = TCPStore(self.address, self.port, is_master=own, timeout=timedelta(seconds=PATIENCE), wait_for_workers=False)
        return store_of_attempt(store, self.rank, self.ranks, PATIENCE) if self.hosted else store

    def _meet(self, server: socket.socket) -> dict[int, Connection]:
        """The connections to all other ranks. Each is welcomed in a thread of its own: others may say nothing."""
        until, found = time.monotonic() + PATIENCE, dict[int, Connection]()
        welcomed: queue.SimpleQueue[tuple[int, Connection]] = queue.SimpleQueue()

        def welcome(connected: socket.socket) -> None:
            if (of_rank := self._welcome(connected)) is not None:
                welcomed.put(of_rank)

        server.settimeout(_LOOK)
        while len(found) < self.ranks - 1:
            if time.monotonic() > until:
                for link in found.values():
                    link.close()
                missing = ", ".join(str(rank) for rank in range(1, self.ranks) if rank not in found)
                raise TimeoutError(f"rank {missing} has not connected within {PATIENCE:.0f} seconds")
            try:
                connected, _ = server.accept()
                threading.Thread(target=welcome, args=(connected,), daemon=True, name="dso-welcome").start()
            except TimeoutError:
                pass
            while not welcomed.empty():
                rank, link = welcomed.get()
                if rank in found:
                    found[rank].close()  # of a process that was started again
                found[rank] = link
        return found

    def _welcome(self, connected: socket.socket) -> tuple[int, Connection] | None:
        """The rank of a process that has connected; None: it does not know the key."""
        link = _link(connected, _HANDSHAKE)
        try:
            deliver_challenge(link, self.key)
            answer_challenge(link, self.key)
            rank = int(link.recv_bytes(16))
        except (OSError, EOFError, ValueError, AuthenticationError, AssertionError):
            link.close()  # AssertionError: of Python 3.10 and 3.11, about a message that is no challenge
            return None
        if not 0 < rank < self.ranks:
            link.close()
            return None
        return rank, _patient(link)


def _bound(address: str) -> str:
    """Where process 0 listens: at its address, or everywhere if that is a name, which it may resolve in another way."""
    try:
        return str(ipaddress.ip_address(address))
    except ValueError:
        return ""


def _family(address: str) -> socket.AddressFamily:
    infos: Iterable[Any] = socket.getaddrinfo(address, None, type=socket.SOCK_STREAM)
    return next(iter(infos))[0]


def _link(connected: socket.socket, timeout: int) -> Connection:
    """The messages of a socket, without delay; a machine that has gone is noticed. `timeout`: in seconds, until `_patient`."""
    connected.settimeout(None)
    for level, option, value in (
        (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1),
        (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
        (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 5),
        (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 5),
        (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3),
        (socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 1000 * _DEAD_AFTER),
    ):
        connected.setsockopt(level, option, value)
    _set_timeout(connected, timeout)
    return Connection(connected.detach())


def _patient(link: Connection) -> Connection:
    with socket.socket(fileno=os.dup(link.fileno())) as connected:
        _set_timeout(connected, 0)
    return link


def _set_timeout(connected: socket.socket, seconds: int) -> None:
    connected.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, seconds.to_bytes(8, "little") + bytes(8))
