"""Origins whose web pages may use the API."""

from __future__ import annotations

import pytest

from deepseek_optimizer import ConfigError
from deepseek_optimizer.server.settings import ServerSettings
from support.live_server import LiveServer


@pytest.fixture(scope="module")
def local(byte_tokenizer):
    from support.fake_engine import FakeEngine

    with LiveServer(FakeEngine(byte_tokenizer), ServerSettings(allow_origins=("localhost",))) as live:
        yield live


def preflight(live, origin: str, method: str = "POST"):
    headers = {"Origin": origin, "Access-Control-Request-Method": method, "Access-Control-Request-Headers": "Authorization"}
    return live.client.options("/v1/completions", headers=headers)


@pytest.mark.parametrize(
    "origin",
    [
        "http://localhost",
        "http://localhost:8080",
        "https://localhost:1",
        "http://127.0.0.1:3000",
        "http://[::1]",
        "http://[::1]:80",
    ],
)
def test_origins_of_this_machine(local, origin):
    response = preflight(local, origin)
    assert response.status_code == 200 and response.headers["access-control-allow-origin"] == origin
    assert response.headers["access-control-allow-methods"] == "GET, POST, DELETE, OPTIONS"
    assert "authorization" in response.headers["access-control-allow-headers"].lower()
    assert "access-control-allow-credentials" not in response.headers and "Origin" in response.headers["vary"]
    assert local.client.get("/health", headers={"Origin": origin}).headers["access-control-allow-origin"] == origin


@pytest.mark.parametrize(
    "origin",
    [
        "http://evil.example",
        "http://notlocalhost",
        "http://localhost.evil.example",
        "http://localhost:8080.evil.example",
        "http://localhost:8080@evil.example",
        "http://127.0.0.1.evil.example",
        "http://127x0x0x1",
        "null",
        "localhost",
        "file://localhost",
    ],
)
def test_other_origins_get_no_permission(local, origin):
    response = preflight(local, origin)
    assert response.status_code == 200
    assert not [name for name in response.headers if name.startswith("access-control-")]
    assert "access-control-allow-origin" not in local.client.get("/health", headers={"Origin": origin}).headers


def test_a_method_that_is_not_allowed(local):
    assert preflight(local, "http://localhost", "PUT").status_code == 400


def test_any_origin(make_server):
    live = make_server(ServerSettings(allow_origins=("*",)))
    response = preflight(live, "https://web.example")
    assert response.headers["access-control-allow-origin"] == "https://web.example"
    assert "access-control-allow-credentials" not in response.headers
    assert live.client.get("/health", headers={"Origin": "https://web.example"}).headers["access-control-allow-origin"] == "*"


def test_invalid_origins():
    with pytest.raises(ConfigError, match="localhost"):
        ServerSettings(allow_origins=("127.0.0.1",))
