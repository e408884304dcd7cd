"""Access control: API keys, Host headers, origins."""

from __future__ import annotations

import pytest

from deepseek_optimizer.server.keys import ApiKeys
from deepseek_optimizer.server.settings import ServerSettings
from support.live_server import assert_error

ASKED = {"prompt": "hello", "max_tokens": 3}


@pytest.fixture(scope="module")
def locked(byte_tokenizer):
    from support.fake_engine import FakeEngine
    from support.live_server import LiveServer

    with LiveServer(FakeEngine(byte_tokenizer), ServerSettings(keys=ApiKeys(["alpha", "beta"]))) as live:
        yield live


def routes(app) -> list[tuple[str, str]]:
    return [(method.upper(), path) for path, methods in app.openapi()["paths"].items() for method in methods]


OPEN = {"/", "/health", "/ready"}


def test_all_routes_but_three_need_a_key(locked):
    actual = [(method, path.replace("{model}", "fake-model")) for method, path in routes(locked.app)]
    assert len(actual) > 8
    for method, path in [*actual, ("GET", "/openapi.json"), ("GET", "/nowhere"), ("GET", "/v1/../health/x")]:
        for address in (path, path + "/") if path not in OPEN else (path + "/",) if path != "/" else ():
            for headers in ({}, {"Authorization": "Bearer gamma"}, {"Authorization": "alpha"}, {"x-api-key": "gamma"}):
                response = locked.client.request(method, address, headers=headers)
                assert response.status_code == 401 and "error" in response.json()
                assert response.headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize("path", sorted(OPEN))
def test_three_paths_need_no_key(locked, path):
    assert locked.client.get(path).status_code in (200, 404)  # 404: no chat page is installed


def test_open_paths_are_open_for_reading_only(locked):
    assert_error(locked.client.post("/", json={"inputs": "x"}), 401)


def test_a_key_in_the_header_of_anthropics_clients(locked):
    answer = locked.client.post("/v1/completions", json=ASKED, headers={"x-api-key": "alpha"})
    assert answer.status_code == 200
    salt = locked.engine.seen[-1].salt
    locked.client.post("/v1/completions", json=ASKED, headers={"Authorization": "Bearer alpha"})
    assert locked.engine.seen[-1].salt == salt != ""


@pytest.mark.parametrize(
    "path,body",
    [
        ("/v1/messages", {"type": "error", "error": {"type": "authentication_error"}}),
        ("/api/chat", {}),
        ("/generate", {"error_type": "validation"}),
    ],
)
def test_errors_have_the_format_of_their_protocol(locked, path, body):
    error = locked.client.post(path, json={}).json()
    message = error["error"].pop("message") if isinstance(error["error"], dict) else error.pop("error")
    assert error == body and "API key" in message


def test_two_authorization_headers_are_rejected(locked):
    headers = [("Authorization", "Bearer alpha"), ("Authorization", "Bearer alpha")]
    assert_error(locked.client.post("/v1/completions", json=ASKED, headers=headers), 401)


def test_keys_in_the_url_are_ignored(locked):
    assert_error(locked.client.get("/v1/models?api_key=alpha&key=alpha"), 401)


def test_the_right_key_is_the_salt_of_the_prefix_cache(locked):
    salts = []
    for key in ("alpha", "beta", "alpha"):
        assert locked.client.post("/v1/completions", json=ASKED, headers={"Authorization": f"Bearer {key}"}).status_code == 200
        salts.append(locked.engine.seen[-1].salt)
    assert salts[0] == salts[2] != salts[1] and all(salts) and "alpha" not in salts[0]


def test_a_wrong_key_is_rejected_before_the_body_is_read(locked):
    answer = locked.raw(
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: 900000000\r\n\r\n{",
        timeout=5,
    )
    assert answer.startswith(b"HTTP/1.1 401 ")


def test_without_keys_all_share_one_salt(live):
    live.client.post("/v1/completions", json=ASKED, headers={"Authorization": "Bearer anything"})
    assert live.engine.seen[-1].salt == ""


@pytest.mark.parametrize("host", ["evil.example", "evil.example:8000", "localhost.evil.example", "", "127.0.0.1.evil.example"])
@pytest.mark.parametrize("path", ["/", "/health", "/v1/models", "/nowhere"])
def test_a_foreign_host_is_rejected(client, host, path):
    assert_error(client.get(path, headers={"Host": host}), 403)


def test_two_or_no_host_headers_are_rejected(live):
    assert (
        live.raw(b"GET /health HTTP/1.1\r\nHost: localhost\r\nHost: evil.example\r\nConnection: close\r\n\r\n").split()[1]
        == b"403"
    )
    assert live.raw(b"GET /health HTTP/1.0\r\n\r\n").split()[1] == b"403"


def test_an_allowed_host(make_server):
    live = make_server(ServerSettings(allow_hosts=("chat.example",)))
    assert live.client.get("/health", headers={"Host": "chat.example:80"}).status_code == 200
    assert live.client.get("/health", headers={"Host": "evil.example"}).status_code == 403


def test_a_foreign_origin_gets_no_cors_header(client):
    for response in (
        client.get("/v1/models", headers={"Origin": "https://evil.example"}),
        client.options(
            "/v1/chat/completions", headers={"Origin": "https://evil.example", "Access-Control-Request-Method": "POST"}
        ),
    ):
        assert not [name for name in response.headers if name.startswith("access-control-")]
    assert response.status_code == 405


def test_an_allowed_origin_may_read(make_server):
    live = make_server(ServerSettings(allow_origins=("https://chat.example",), keys=ApiKeys(["alpha"])))
    requested = {
        "Origin": "https://chat.example",
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization,content-type",
    }
    response = live.client.options("/v1/completions", headers=requested)  # browsers send no key with a preflight request
    assert response.status_code == 200 and response.headers["access-control-allow-origin"] == "https://chat.example"
    response = live.client.get("/health", headers={"Origin": "https://evil.example"})
    assert "access-control-allow-origin" not in response.headers
    response = live.client.get("/v1/models", headers={"Origin": "https://chat.example"})
    assert response.status_code == 401 and response.headers["access-control-allow-origin"] == "https://chat.example"


@pytest.mark.parametrize(
    "method,path",
    [
        ("GET", "/v1/chat/completions"),
        ("PUT", "/v1/completions"),
        ("DELETE", "/v1/models"),
        ("POST", "/health"),
        ("PATCH", "/metrics"),
        ("POST", "/"),
    ],
)
def test_a_wrong_method(client, method, path):
    response = client.request(method, path)
    assert_error(response, 405)
    assert response.headers["allow"]


NOWHERE = [
    "/v1",
    "/v1/engines",
    "/docs",
    "/redoc",
    "/v1/chat/completions/",
    "/.env",
    "/page/app.py",
    "/page/%2e%2e%2fapp.py",
    "/page/%2e%2e/app.py",
    "/etc/passwd",
    "/v1/models/../../etc/passwd",
]


@pytest.mark.parametrize("path", NOWHERE)
def test_an_unknown_path(client, path):
    assert_error(client.get(path), 404)


@pytest.mark.parametrize("status", [200, 404])
def test_every_answer_has_the_security_headers(client, status):
    response = client.get("/health" if status == 200 else "/nowhere")
    assert response.status_code == status
    assert response.headers["x-content-type-options"] == "nosniff" and response.headers["referrer-policy"] == "no-referrer"
    assert "server" not in response.headers
