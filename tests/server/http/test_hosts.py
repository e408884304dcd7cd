"""Which Host headers a server accepts."""

from __future__ import annotations

import pytest

from deepseek_optimizer.server.http.hosts import HostCheck, is_loopback


@pytest.mark.parametrize("host", ["127.0.0.1", "127.9.9.9", "::1", "localhost"])
def test_loopback(host):
    assert is_loopback(host)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.2", "example.org", ""])
def test_not_loopback(host):
    assert not is_loopback(host)


@pytest.mark.parametrize(
    "header", ["localhost", "localhost:8000", "127.0.0.1:1", "[::1]", "[::1]:8000", "LOCALHOST", "localhost."]
)
def test_a_loopback_server_accepts_its_names(header):
    assert HostCheck("127.0.0.1").accepts(header)


@pytest.mark.parametrize(
    "header",
    [
        None,
        "",
        "evil.example",
        "evil.example:8000",
        "localhost.evil.example",
        "127.0.0.1.evil.example",
        "localhost:80:80",
        "[::1",
        "[::1]x",
        "localhost:x",
        "127.0.0.1@evil.example",
        "0.0.0.0",
        "localhost/evil",
    ],
)
def test_a_loopback_server_rejects_other_names(header):
    assert not HostCheck("127.0.0.1").accepts(header)


def test_names_can_be_allowed():
    check = HostCheck("127.0.0.1", ["chat.example"])
    assert check.accepts("chat.example:443") and check.accepts("localhost") and not check.accepts("evil.example")


def test_a_network_server_accepts_any_name_by_default():
    assert HostCheck("0.0.0.0").accepts("anything") and HostCheck("0.0.0.0").accepts(None)
    check = HostCheck("0.0.0.0", ["chat.example"])
    assert check.accepts("chat.example") and not check.accepts("evil.example")
