"""The proxy's middleware: the routing header, and second attempts before the first byte of an answer."""

from __future__ import annotations

import asyncio
import json

import pytest

from deepseek_optimizer.ray import proxy as proxy_module
from deepseek_optimizer.ray.prefix_keys import prefix_keys
from deepseek_optimizer.ray.proxy import RoutedRequests, note_replica
from deepseek_optimizer.ray.routing_header import Routing, read, session_of

CHAT = json.dumps({"messages": [{"role": "user", "content": "Hello"}]}).encode()
START = {"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"application/json")]}
EVENTS = {**START, "headers": [(b"content-type", b"text/event-stream; charset=utf-8")]}
JSON = (b"content-type", b"application/json")
END = {"type": "http.response.body", "body": b"end"}


class Proxy:
    """Stands for Ray's proxy: each attempt answers with the next script, a list of messages."""

    def __init__(self, *scripts) -> None:
        self.scripts, self.scopes, self.bodies = list(scripts), [], []

    async def __call__(self, scope, receive, send) -> None:
        self.scopes.append(scope)
        body = b""
        while True:
            message = await receive()
            body += message.get("body", b"")
            if not message.get("more_body"):
                break
        self.bodies.append(body)
        for message in self.scripts.pop(0):
            await send(message)

    def routing(self) -> Routing | None:
        values = [value for name, value in self.scopes[-1]["headers"] if name == b"x-session-id"]
        assert len(values) <= 1
        return read(values[0].decode()) if values else None


def receiving(*parts: bytes):
    """The `receive` of a client that sends a body in parts and disconnects."""
    left = [{"type": "http.request", "body": part, "more_body": i + 1 < len(parts)} for i, part in enumerate(parts)]

    async def receive():
        return left.pop(0) if left else {"type": "http.disconnect"}

    return receive


async def ignore(message) -> None:
    pass


def run(proxy: Proxy, *parts: bytes, path: str = "/v1/chat/completions", headers=(), kind=JSON) -> list[dict]:
    """The messages that a client gets for a request whose body comes in parts."""
    sent: list[dict] = []

    async def send(message) -> None:
        sent.append(message)

    scope = {"type": "http", "path": path, "headers": [kind, *headers], "client": ("10.0.0.1", 5)}
    asyncio.run(RoutedRequests(proxy, "X-Session-Id")(scope, receiving(*parts), send))
    return sent


def test_a_request_with_a_prompt_gets_its_keys() -> None:
    proxy = Proxy([START, END])
    assert run(proxy, CHAT[:10], CHAT[10:]) == [START, END]
    assert proxy.routing() == Routing(None, prefix_keys(CHAT)) and proxy.bodies == [CHAT]


def test_the_session_of_a_client_is_kept() -> None:
    proxy = Proxy([START, END])
    run(proxy, CHAT, headers=[(b"x-session-id", b"mine"), (b"accept", b"*/*")])
    assert proxy.routing() == Routing(session_of("session mine"), prefix_keys(CHAT))
    assert (b"accept", b"*/*") in proxy.scopes[0]["headers"]


def test_clients_cannot_send_what_the_proxy_writes() -> None:
    proxy = Proxy([START, END])
    run(proxy, b"", headers=[(b"x_session_id", b"dso:stays::1,2,3")])  # Ray would read this too
    assert proxy.routing() == Routing(session_of("session dso:stays::1,2,3"), [])
    assert [name for name, _ in proxy.scopes[0]["headers"]] == [b"content-type", b"x-session-id"]


@pytest.mark.parametrize("name", ["authorization", "x-api-key", None])
def test_clients_with_files_and_responses_stay_at_a_replica(name: str | None) -> None:
    headers = [] if name is None else [(name.encode(), b"secret")]
    session = session_of("peer 10.0.0.1" if name is None else "key secret")
    body = json.dumps({"previous_response_id": "resp_1", "input": "on"}).encode()
    for path, sent in (("/v1/files", b"x"), ("/chat/v1/files/f", b""), ("/other", body)):
        proxy = Proxy([START, END])
        run(proxy, sent, path=path, headers=headers)
        assert proxy.routing() == Routing(session, prefix_keys(sent), stays=True)
        assert b"secret" not in dict(proxy.scopes[0]["headers"])[b"x-session-id"]


def test_requests_of_other_applications_are_passed_on_unchanged() -> None:
    proxy = Proxy([])
    assert run(proxy, b"data", path="/other", headers=[(b"a", b"b")]) == []  # not repeated either
    assert proxy.scopes[0]["headers"] == [JSON, (b"a", b"b")] and proxy.bodies == [b"data"]


def attempts_of(*messages, kind=JSON) -> int:
    """How often a request is sent to a replica, whose body is passed on completely; none of them answers."""
    attempts = 0

    async def app(scope, receive, send) -> None:
        nonlocal attempts
        attempts += 1
        while (await receive()).get("more_body"):
            pass

    left = list(messages)

    async def receive():
        while not left or isinstance(left[0], float):
            await asyncio.sleep(left.pop(0) if left else 3600)
        return left.pop(0)

    scope = {"type": "http", "path": "/v1/chat/completions", "headers": [kind]}
    middleware = RoutedRequests(app, "x-session-id")
    asyncio.run(middleware(scope, receive, ignore))
    assert middleware._held == 0
    return attempts


def test_bodies_that_are_large_slow_or_of_another_type_are_passed_on_in_pieces(monkeypatch) -> None:
    parts = [{"type": "http.request", "body": CHAT[:9], "more_body": True}, {"type": "http.request", "body": CHAT[9:]}]
    assert attempts_of(*parts) == 3
    assert attempts_of(*parts, kind=(b"content-type", b"multipart/form-data; boundary=x")) == 1
    with monkeypatch.context() as patch:
        patch.setattr(proxy_module, "_READ_SECONDS", 0.05)
        assert attempts_of(parts[0], 0.5, parts[1]) == 1
    for limit in ("_MAX_BODY", "_MAX_HELD"):
        with monkeypatch.context() as patch:
            patch.setattr(proxy_module, limit, 5)
            assert attempts_of(*parts) == 1


def test_a_replica_that_ends_before_its_answer_is_replaced() -> None:
    proxy = Proxy([], [], [START, END])
    assert run(proxy, CHAT) == [START, END]
    assert proxy.bodies == [CHAT] * 3


def test_after_three_attempts_the_client_is_told() -> None:
    proxy = Proxy([], [], [])
    start, body = run(proxy, CHAT)
    assert start["status"] == 503 and (b"retry-after", b"1") in start["headers"]
    assert json.loads(body["body"])["error"]["code"] == "replica_lost"


def test_a_second_attempt_has_the_root_path_of_the_first() -> None:
    paths = []

    async def proxy(scope, receive, send) -> None:
        paths.append(scope["root_path"])
        scope["root_path"] += "/chat"  # as Ray does

    scope = {"type": "http", "path": "/chat/v1/chat/completions", "root_path": "", "headers": [JSON]}
    asyncio.run(RoutedRequests(proxy, "x-session-id")(scope, receiving(CHAT), ignore))
    assert paths == ["", "", ""]


def test_a_request_whose_client_has_left_is_not_repeated() -> None:
    attempts, sent = [], []

    async def proxy(scope, receive, send) -> None:
        attempts.append(scope)
        while (await receive())["type"] != "http.disconnect":
            pass

    async def send(message) -> None:
        sent.append(message)

    scope = {"type": "http", "path": "/v1/chat/completions", "headers": [JSON]}
    asyncio.run(RoutedRequests(proxy, "x-session-id")(scope, receiving(CHAT), send))
    assert len(attempts) == 1 and not sent


def test_answers_of_replicas_are_final_whatever_their_status() -> None:
    failed = {**START, "status": 500}
    proxy = Proxy([failed, END])
    assert run(proxy, CHAT) == [failed, END]


def test_a_stream_that_breaks_ends_with_an_error_and_is_not_repeated() -> None:
    begun = {"type": "http.response.body", "body": b"data: a\n\n", "more_body": True}
    proxy = Proxy([EVENTS, begun])
    *sent, last = run(proxy, CHAT)
    assert sent == [EVENTS, begun] and not last.get("more_body")
    assert json.loads(last["body"].removeprefix(b"event: error\ndata: "))["error"]["code"] == "replica_lost"


def test_another_answer_that_breaks_stays_incomplete() -> None:
    proxy = Proxy([START, {**END, "more_body": True}])
    assert run(proxy, CHAT) == [START, {**END, "more_body": True}]


def test_a_client_that_leaves_while_it_sends_is_not_answered() -> None:
    proxy, sent = Proxy(), []

    async def send(message) -> None:
        sent.append(message)

    scope = {"type": "http", "path": "/", "headers": [JSON]}
    asyncio.run(RoutedRequests(proxy, "x-session-id")(scope, receiving(), send))
    assert not sent and not proxy.scopes


def test_responses_name_their_replica() -> None:
    async def app(scope, receive, send) -> None:
        await send(START)
        await send(END)

    sent = []

    async def send(message) -> None:
        sent.append(message)

    asyncio.run(note_replica(app, "abc")({"type": "http"}, None, send))
    assert sent[0]["headers"] == [*START["headers"], (b"x-replica-id", b"abc")] and sent[1] == END
