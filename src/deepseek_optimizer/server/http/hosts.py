"""Whether a request was meant for this server: a page whose name was rebound to 127.0.0.1 sends its own name as Host."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable

_LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})


def is_loopback(host: str) -> bool:
    """Whether an address to listen at can be reached from this machine alone."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class HostCheck:
    """
    Args:
        bound: the address that the server listens at.
        allowed: names beside the loopback ones.
    """

    def __init__(self, bound: str, allowed: Iterable[str] = ()) -> None:
        names = {name.lower().strip("[]") for name in allowed}
        self._names = _LOOPBACK | names | {bound.lower()} if is_loopback(bound) or names else None

    def accepts(self, header: str | None) -> bool:
        """Whether a Host header names this server; its port may be any."""
        if self._names is None:
            return True
        return header is not None and host_name(header) in self._names


def host_name(header: str) -> str:
    """Without the port and an IPv6 address's brackets; "" where the header is malformed."""
    header = header.strip().lower()
    if header.startswith("["):
        name, bracket, rest = header[1:].partition("]")
        return name if bracket and _is_port(rest) else ""
    name, colon, port = header.partition(":")
    return name.rstrip(".") if _is_port(colon + port) else ""


def _is_port(text: str) -> bool:
    return text in ("", ":") or (text[0] == ":" and text[1:].isdecimal() and len(text) <= 6)
