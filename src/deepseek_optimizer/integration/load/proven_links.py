"""Connections between the processes of a model on several machines, whose two sides have proved that they know DSO_RANK_KEY.

Messages are pickled, so whoever could send one could run code here. Nothing is encrypted.
"""

from __future__ import annotations

import ipaddress
import os
import queue
import socket
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from multiprocessing import AuthenticationError
from multiprocessing.connection import Connection, answer_challenge, deliver_challenge
from typing import Any

from ...backends.parallel.messages import has_ended

PATIENCE = 600.0  # seconds until all processes have connected
_HANDSHAKE = 10  # seconds
_LOOK = 0.05  # seconds between looks for processes that have proved who they are
_DEAD_AFTER = 20  # seconds without a sign of life of the other machine
_LONGEST_NAME = 32  # bytes


def listen(address: str) -> socket.socket:
    """A server at an address of this machine, at any port; everywhere if that is a name, which others may resolve in another
    way. Raises OSError."""
    infos: Iterable[Any] = socket.getaddrinfo(address, None, type=socket.SOCK_STREAM)
    return socket.create_server((_bound(address), 0), family=next(iter(infos))[0])


def meet(
    server: socket.socket, key: bytes, names: Mapping[str, int], others: Sequence[Connection] = ()
) -> dict[str, Connection]:
    """The connections of all processes that are expected. Each is welcomed in a thread of its own: others may say nothing.

    Args:
        server: from `listen`.
        key: the secret that all processes know.
        names: what each of them says of itself, and its rank.
        others: connections to processes that must not end meanwhile.

    Raises:
        OSError: not all of them have connected in time, or one of `others` has ended.
    """
    until, found = time.monotonic() + PATIENCE, dict[str, Connection]()
    welcomed: queue.SimpleQueue[tuple[str, Connection]] = queue.SimpleQueue()

    def welcome(connected: socket.socket) -> None:
        if (named := _welcome(connected, key)) is not None:
            welcomed.put(named)

    server.settimeout(_LOOK)
    try:
        while len(found) < len(names):
            if time.monotonic() > until:
                missing = ", ".join(str(rank) for rank in sorted({rank for name, rank in names.items() if name not in found}))
                raise TimeoutError(f"rank {missing} has not connected within {PATIENCE:.0f} seconds")
            if any(map(has_ended, others)):
                raise ConnectionError("another process has ended")
            try:
                connected, _ = server.accept()
                threading.Thread(target=welcome, args=(connected,), daemon=True, name="dso-welcome").start()
            except TimeoutError:
                pass
            while not welcomed.empty():
                name, link = welcomed.get()
                earlier = found.pop(name, None)
                if earlier is not None:
                    earlier.close()  # of a process that was started again
                if name in names:
                    found[name] = link
                else:
                    link.close()
    except BaseException:
        for link in found.values():
            link.close()
        raise
    return found


def connect(address: tuple[str, int], key: bytes, name: str) -> Connection:
    """The connection to a process that meets others, which learns this name. Raises OSError."""
    link = _link(socket.create_connection(address, timeout=_HANDSHAKE), int(PATIENCE))  # it may have other things to do first
    try:
        answer_challenge(link, key)
        deliver_challenge(link, key)
        link.send_bytes(name.encode())
    except (EOFError, AuthenticationError, AssertionError) as error:  # AssertionError: see `_welcome`
        link.close()
        raise ConnectionError(str(error) or type(error).__name__) from error
    return _patient(link)


def for_rows(link: Connection) -> Connection:
    """The connection, which may be full for longer than others: the other side reads it when it comes to the next exchange, and
    its weights may still have to be read from a disk."""
    with socket.socket(fileno=os.dup(link.fileno())) as connected:
        connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 0)
    return link


def own_address(link: Connection) -> str:
    """This machine's address at a connection."""
    with socket.socket(fileno=os.dup(link.fileno())) as connected:
        return str(connected.getsockname()[0])


def _welcome(connected: socket.socket, key: bytes) -> tuple[str, Connection] | None:
    """The name of a process that has connected; None: it does not know the key."""
    link = _link(connected, _HANDSHAKE)
    try:
        deliver_challenge(link, key)
        answer_challenge(link, key)
        name = link.recv_bytes(_LONGEST_NAME).decode()
    except (OSError, EOFError, ValueError, AuthenticationError, AssertionError):
        link.close()  # AssertionError: of Python 3.10 and 3.11, about a message that is no challenge
        return None
    return name, _patient(link)


def _bound(address: str) -> str:
    try:
        return str(ipaddress.ip_address(address))
    except ValueError:
        return ""


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
