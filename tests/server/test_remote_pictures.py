"""Pictures by address: which hosts are allowed, and what a hostile server or client achieves."""

from __future__ import annotations

import ipaddress
import socket
import ssl
import threading

import pytest

from deepseek_optimizer.errors import ConfigError, RequestError
from deepseek_optimizer.server.remote_pictures import RemotePictures, _is_public, is_remote
from deepseek_optimizer.server.settings import ServerSettings
from support.certificates import issue_certificates
from support.file_server import FileServer

LOCAL = "127.0.0.0/8"


def redirect(target):
    def answer(handler):
        handler.send_response(302)
        handler.send_header("Location", target)
        handler.end_headers()

    return answer


def reader(*allowed, seconds=10.0, max_bytes=1 << 20):
    return RemotePictures(allowed, seconds, max_bytes)


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("93.184.216.34", True),
        ("2606:2800:220:1::1", True),
        ("127.0.0.1", False),
        ("10.1.2.3", False),
        ("172.16.0.1", False),
        ("192.168.1.1", False),
        ("169.254.169.254", False),  # metadata of a cloud
        ("100.64.0.1", False),
        ("0.0.0.0", False),
        ("224.0.0.1", False),
        ("255.255.255.255", False),
        ("::1", False),
        ("::", False),
        ("fe80::1", False),
        ("fc00::1", False),
        ("ff02::1", False),
        ("::ffff:127.0.0.1", False),
        ("::ffff:93.184.216.34", True),
        ("64:ff9b::7f00:1", False),  # 127.0.0.1 through NAT64
        ("64:ff9b::5db8:d822", True),
        ("2002:7f00:1::", False),  # 127.0.0.1 through 6to4
    ],
)
def test_public_addresses(address, public):
    assert _is_public(ipaddress.ip_address(address)) is public


def test_allowed_hosts_are_fetched():
    with FileServer({"/a": b"hello"}) as files:
        for allowed, host in (((LOCAL,), "127.0.0.1"), (("localhost", LOCAL), "localhost"), (("*", LOCAL), "LOCALHOST.")):
            assert reader(*allowed).read(f"http://{host}:{files.port}/a", "f") == b"hello"


@pytest.mark.parametrize(
    ("allowed", "host", "message"),
    [
        ((), "127.0.0.1", "fetches no pictures from '127.0.0.1'; .* --allowed-media-domains 127.0.0.1"),
        (("example.org",), "localhost", "fetches no pictures from 'localhost'"),
        ((LOCAL,), "localhost", "fetches no pictures from 'localhost'"),  # a name must be given too
        (("localhost",), "localhost", "has an address that is not public; .* --allowed-media-domains and the network"),
        (("*",), "127.0.0.1", "has an address that is not public"),
        (("*",), "2130706433", "has an address that is not public"),  # 127.0.0.1 as one number
        (("*",), "0x7f.1", "has an address that is not public"),
        (("*",), "0", "has an address that is not public"),
        (("*",), "[::ffff:127.0.0.1]", "has an address that is not public"),
        (("*", LOCAL), "user:password@127.0.0.1", "without user and password"),
        (("*", "10.0.0.0/8"), "127.0.0.1", "has an address that is not public"),
    ],
)
def test_other_hosts_are_not_asked(allowed, host, message):
    with FileServer({"/a": b"hello"}) as files:
        with pytest.raises(RequestError, match=message) as error:
            reader(*allowed).read(f"http://{host}:{files.port}/a", "f")
        assert files.requests == [] and "\n" not in str(error.value) and error.value.field == "f"


def test_every_address_of_a_name_is_checked_and_used(monkeypatch):
    """A name that resolves to a public and a private address is refused, and it is resolved once."""
    real, asked = socket.getaddrinfo, []

    def resolve(host, port, *args, **more):
        asked.append(host)
        return real("93.184.216.34", port, *args, **more) + real("127.0.0.1", port, *args, **more)

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    with FileServer({"/a": b"hello"}) as files:
        with pytest.raises(RequestError, match="has an address that is not public"):
            reader("evil.example").read(f"http://evil.example:{files.port}/a", "f")
        assert files.requests == [] and asked == ["evil.example"]
    monkeypatch.setattr(
        socket, "getaddrinfo", lambda host, port, *a, **m: asked.append(host) or real("127.0.0.1", port, *a, **m)
    )
    with FileServer({"/a": b"hello"}) as files:
        assert reader("good.example", LOCAL).read(f"http://good.example:{files.port}/a", "f") == b"hello"
        assert asked.count("good.example") == 1


def test_redirects_are_checked():
    with (
        FileServer({"/secret": b"secret"}) as inner,
        FileServer(
            {
                "/inner": redirect(f"http://localhost:{inner.port}/secret"),
                "/file": redirect("file:///etc/passwd"),
                "/data": redirect("data:image/png;base64,AAAA"),
                "/loop": redirect("/loop"),
                "/bad": redirect("http://[::1"),
                "/ok": redirect("there"),
                "/there": b"hello",
            }
        ) as files,
    ):
        get = reader("127.0.0.1", LOCAL).read
        assert get(f"http://127.0.0.1:{files.port}/ok", "f") == b"hello"
        for path, message in (
            ("inner", "fetches no pictures from 'localhost'"),
            ("file", "must be a data: URL, or an http or https URL"),
            ("data", "must be a data: URL, or an http or https URL"),
            ("loop", "more than 3 redirects"),
            ("bad", "cannot be fetched"),
        ):
            with pytest.raises(RequestError, match=message):
                get(f"http://127.0.0.1:{files.port}/{path}", "f")
        assert inner.requests == []


def test_certificates_are_verified(tmp_path, monkeypatch):
    issue_certificates(tmp_path)
    with FileServer({"/a": b"hello"}, (tmp_path / "server.pem", tmp_path / "server-key.pem")) as files:
        url = f"https://127.0.0.1:{files.port}/a"
        with pytest.raises(RequestError, match="cannot be fetched from .*SSLCertVerificationError"):
            reader(LOCAL).read(url, "f")
        assert files.requests == []
        create = ssl.create_default_context
        monkeypatch.setattr(ssl, "create_default_context", lambda: create(cafile=str(tmp_path / "ca.pem")))
        assert reader(LOCAL).read(url, "f") == b"hello"
        with pytest.raises(RequestError, match="SSLCertVerificationError"):  # of another name
            reader("localhost", LOCAL).read(url.replace("127.0.0.1", "localhost"), "f")


def test_size_status_and_truncated_answers():
    def endless(handler):
        handler.send_response(200)
        handler.end_headers()
        try:
            while True:
                handler.wfile.write(b"x" * 65536)
        except OSError:
            pass

    def short(handler):
        handler.send_response(200)
        handler.send_header("Content-Length", "100")
        handler.end_headers()
        handler.wfile.write(b"hello")

    def garbage(handler):
        handler.wfile.write(b"\x00\xff not HTTP\r\n\r\n")

    with FileServer({"/endless": endless, "/short": short, "/garbage": garbage}) as files:
        for path, message in (
            ("endless", "is larger than 1 MiB"),
            ("short", "cannot be fetched from .*IncompleteRead"),
            ("garbage", "cannot be fetched from .*BadStatusLine"),
            ("missing", "answers with status 404"),
        ):
            with pytest.raises(RequestError, match=message):
                reader(LOCAL).read(f"http://127.0.0.1:{files.port}/{path}", "f")


@pytest.mark.parametrize("head", [b"", b"HTTP/1.1 200 OK\r\nX: ", b"HTTP/1.1 200 OK\r\n\r\n"])
def test_slow_servers(head):
    """A byte now and then does not keep a thread busy beyond the limit, in the headers or in the content."""
    end = threading.Event()

    def slow(handler):
        try:
            handler.wfile.write(head)
            while not end.wait(0.02):
                handler.wfile.write(b"x" if head else b"")
        except OSError:
            pass

    with FileServer({"/a": slow}) as files:
        try:
            with pytest.raises(RequestError, match=r"did not arrive within 0\.3 s"):
                reader(LOCAL, seconds=0.3).read(f"http://127.0.0.1:{files.port}/a", "f")
        finally:
            end.set()


@pytest.mark.parametrize(
    "url", ["http://", "http://[::1", "http://127.0.0.1:99999/", "https://exa mple.org/", "http://\x00/", "http://%/"]
)
def test_malformed_addresses(url):
    assert is_remote(url)
    with pytest.raises(RequestError) as error:
        reader("*", LOCAL).read(url, "f")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("entry", ["", "http://example.org", "example.org:80", "10.0.0.1/8", "a b", "user@host"])
def test_settings_name_hosts(entry):
    with pytest.raises(ConfigError, match="allowed_media_domains"):
        ServerSettings(allowed_media_domains=(entry,))


def test_names_are_compared_as_they_are_resolved(monkeypatch):
    monkeypatch.setattr(socket, "getaddrinfo", lambda host, *_, **__: (_ for _ in ()).throw(socket.gaierror(host)))
    with pytest.raises(RequestError, match="cannot be fetched from .*gaierror"):
        reader("b\xfccher.example").read("http://B\xdcCHER.example./a", "f")
