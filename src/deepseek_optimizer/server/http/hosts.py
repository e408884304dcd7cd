"""Checks of the Host header, against DNS rebinding: a page whose name was rebound to 127.0.0.1 sends that name as Host."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable

_LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})


def is_loopback(host: str) -> bool:
    """Whether a listening address can only be reached from this machine."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class HostCheck:
    """Decides which Host headers are accepted.

    Args:
        bound: the address that the server listens at.
        allowed: accepted names, besides the loopback names.
    """

    def __init__(self, bound: str, allowed: Iterable[str] = ()) -> None:
        names = {name.lower().strip("[]") for name in allowed}
        self._names = _LOOPBACK | names | {bound.lower()} if is_loopback(bound) or names else None

    def accepts(self, header: str | None) -> bool:
        """Whether a Host header names this server; any port is accepted."""
        if self._names is None:
            return True
        return header is not None and host_name(header) in self._names


def host_name(header: str) -> str:
    """The name in a Host header, without port and without the brackets of an IPv6 address; "" if it is malformed."""
    header = header.strip().lower()
    if header.startswith("["):
        name, bracket, rest = header[1:].partition("]")
        return name if bracket and _is_port(rest) else ""
    name, colon, port = header.partition(":")
    return name.rstrip(".") if _is_port(colon + port) else ""


def _is_port(text: str) -> bool:
    return text in ("", ":") or (text[0] == ":" and text[1:].isdecimal() and len(text) <= 6)
