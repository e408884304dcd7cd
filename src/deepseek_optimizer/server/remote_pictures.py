"""Fetches pictures by address for requests, from hosts that the server's settings allow.

Addresses come from clients, who must not reach through the server what they cannot reach themselves. So each name is
resolved once, all addresses that it resolves to must be public or allowed, the connection goes to one of those that were
checked, and a redirect is checked as the first address is. Proxies of the environment are not used.
"""

from __future__ import annotations

import http.client
import ipaddress
import re
import socket
import ssl
import threading
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import Any
from urllib.parse import SplitResult, quote, urljoin, urlsplit

from ..errors import ConfigError, RequestError, excerpt

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network

MAX_REDIRECTS = 3
FLAG = "--allowed-media-domains"
_REDIRECTS = (301, 302, 303, 307, 308)
_NAT64 = ipaddress.ip_network("64:ff9b::/96")  # of IPv4 addresses
_SAFE = "/?:@!$&'()*+,;=%~-._[]"  # characters of a path and a query that are sent unchanged
_NAME = re.compile(r"[\w.-]+")
_PIECE = 64 << 10
_HEADERS = {"Accept": "image/*", "Accept-Encoding": "identity", "User-Agent": "deepseek-optimizer", "Connection": "close"}


def is_remote(url: str) -> bool:
    """Whether a picture's URL is the address of a file on another server."""
    return url[:8].lower().startswith(("http://", "https://"))


def allowed_hosts(entries: Iterable[str]) -> tuple[set[str], list[Network]]:
    """The names and the networks in a list, see `RemotePictures`.

    Raises:
        ConfigError: an entry is neither.
    """
    names: set[str] = set()
    networks: list[Network] = []
    for entry in entries:
        try:
            networks.append(ipaddress.ip_network(entry))
        except ValueError:
            if entry != "*" and not _NAME.fullmatch(entry):
                raise ConfigError(
                    f"allowed_media_domains: {entry!r} is neither the name of a host nor a network, such as 192.168.0.0/16, "
                    "nor *; leave out scheme, port and path"
                ) from None
            names.add(_ascii(entry))
    return names, networks


class RemotePictures:
    """
    Args:
        allowed: names of hosts, "*" for all; and networks, or single addresses, which may be private. A name in the list may
            resolve to public addresses and to those in the list.
        seconds: maximum time for one picture, redirects included.
        max_bytes: maximum size of one picture.

    Raises:
        ConfigError: see `allowed_hosts`.
    """

    def __init__(self, allowed: Iterable[str], seconds: float, max_bytes: int) -> None:
        self.seconds, self.max_bytes = seconds, max_bytes
        self._names, self._networks = allowed_hosts(allowed)

    def read(self, url: str, field: str) -> bytes:
        """The content of an address. It blocks.

        Args:
            url: http or https.
            field: for errors.

        Raises:
            RequestError: the host is not allowed or does not answer, or the file is too large, or takes too long.
        """
        end = time.monotonic() + self.seconds
        for _ in range(MAX_REDIRECTS + 1):
            try:
                data, target = self._get(url, field, end)
            except (OSError, http.client.HTTPException, ValueError) as error:
                if isinstance(error, RequestError):
                    raise
                if isinstance(error, TimeoutError) or time.monotonic() >= end:
                    raise RequestError(field, f"did not arrive within {self.seconds:g} s; send a data: URL") from None
                raise RequestError(field, f"cannot be fetched from {excerpt(url)!r} ({type(error).__name__})") from None
            if target is None:
                return data
            url = target
        raise RequestError(field, f"has more than {MAX_REDIRECTS} redirects")

    def _get(self, url: str, field: str, end: float) -> tuple[bytes, str | None]:
        """The content of an address, or the address to which it redirects."""
        parts = urlsplit(url)
        secure = parts.scheme == "https"
        host, usual = self._host(parts, field), 443 if secure else 80
        port = parts.port or usual
        connection = http.client.HTTPConnection(host, port)
        connection.default_port = usual  # which the header Host omits
        connection.sock = sock = self._connected(host, port, secure, field, end)
        # A server that sends a byte now and then never exceeds the time limit of a socket, which is one of each call.
        timer = threading.Timer(max(0.0, end - time.monotonic()), _shut_down, (sock,))
        timer.daemon = True
        timer.start()
        try:
            if isinstance(sock, ssl.SSLSocket):
                sock.do_handshake()
            path = quote(parts.path or "/", safe=_SAFE) + (f"?{quote(parts.query, safe=_SAFE)}" if parts.query else "")
            connection.request("GET", path, headers=_HEADERS)
            response = connection.getresponse()
            target = response.headers.get("Location")
            if response.status in _REDIRECTS and target:
                return b"", urljoin(url, target)
            if response.status != 200:
                raise RequestError(field, f"cannot be fetched: {excerpt(host)} answers with status {response.status}")
            return self._body(response, field, end), None
        finally:
            timer.cancel()
            connection.close()

    def _host(self, parts: SplitResult, field: str) -> str:
        host = _ascii(parts.hostname or "")
        if parts.scheme not in ("http", "https") or not host or parts.username is not None:
            raise RequestError(field, "must be a data: URL, or an http or https URL without user and password")
        address = _address(host)
        if "*" not in self._names and host not in self._names and (address is None or not self._is_listed(address)):
            raise RequestError(
                field,
                f"the server fetches no pictures from {excerpt(host)!r}; send a data: URL, or start the server with "
                f"{FLAG} {excerpt(host)}",
            )
        return host

    def _connected(self, host: str, port: int, secure: bool, field: str, end: float) -> socket.socket:
        """A connection to an address of a host, all of which are allowed."""
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        for *_, place in found:
            address = ipaddress.ip_address(str(place[0]).partition("%")[0])
            if not (_is_public(address) or self._is_listed(address)):
                raise RequestError(
                    field,
                    f"{excerpt(host)!r} has an address that is not public; send a data: URL, or start the server with "
                    f"{FLAG} and the network of that address",
                )
        raw = _first(found, end)
        if not secure:
            return raw
        try:
            return ssl.create_default_context().wrap_socket(raw, server_hostname=host, do_handshake_on_connect=False)
        except BaseException:
            raw.close()
            raise

    def _body(self, response: http.client.HTTPResponse, field: str, end: float) -> bytes:
        data = bytearray()
        while piece := response.read1(_PIECE):
            data += piece
            if len(data) > self.max_bytes:
                raise RequestError(field, f"is larger than {self.max_bytes >> 20} MiB")
        _left(end)  # otherwise, the timer may have ended the response
        if response.length:
            raise http.client.IncompleteRead(b"", response.length)
        return bytes(data)

    def _is_listed(self, address: Address) -> bool:
        plain = _plain(address)
        return any(plain.version == network.version and plain in network for network in self._networks)


def _first(found: Sequence[Any], end: float) -> socket.socket:
    """A connection to the first address that accepts one."""
    problem: OSError = ConnectionError("no address")
    for family, kind, protocol, _, place in found:
        sock = socket.socket(family, kind, protocol)
        try:
            sock.settimeout(_left(end))
            sock.connect(place)
            return sock
        except OSError as error:
            sock.close()
            problem = error
    raise problem


def _shut_down(sock: socket.socket) -> None:
    """Ends a connection that another thread is reading."""
    with suppress(OSError):  # the other side has ended it
        socket.socket.shutdown(sock, socket.SHUT_RDWR)  # not SSLSocket's, which changes the object


def _left(end: float) -> float:
    left = end - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left


def _ascii(name: str) -> str:
    """A host's name in the form in which it is resolved. ValueError: it has none."""
    return name.lower().rstrip(".").encode("idna").decode() if not name.isascii() else name.lower().rstrip(".")


def _address(host: str) -> Address | None:
    try:
        return ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return None


def _plain(address: Address) -> Address:
    """An IPv4 address in place of an IPv6 address by which it is reached."""
    if isinstance(address, ipaddress.IPv6Address):
        inner = address.ipv4_mapped or address.sixtofour or (address.teredo[1] if address.teredo else None)
        if inner is None and address in _NAT64:
            inner = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
        return inner or address
    return address


def _is_public(address: Address) -> bool:
    plain = _plain(address)
    return plain.is_global and not plain.is_multicast and not plain.is_reserved
