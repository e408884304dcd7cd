"""Limits on connections before a request is complete, and clients that do not read."""

from __future__ import annotations

import json
import socket
import time

import pytest

from deepseek_optimizer.server.settings import ServerSettings
from support.live_server import read_all, wait_for

GET = b"GET /health HTTP/1.1\r\nHost: localhost\r\n"


def status_of(answer: bytes) -> int:
    return int(answer.split(b" ", 2)[1])


def error_of(answer: bytes) -> dict:
    return json.loads(answer.partition(b"\r\n\r\n")[2])["error"]


@pytest.mark.parametrize(
    "head",
    [
        GET + b"X-A: " + b"a" * 1_000_000,  # never ends
        GET + b"X-A: " + b"a" * 100_000 + b"\r\n\r\n",
        GET + b"".join(b"X-%d: a\r\n" % i for i in range(1000)) + b"\r\n",
        GET + b"".join(b"X-%d: %s\r\n" % (i, b"a" * 1000) for i in range(60)) + b"\r\n",
        b"GET /" + b"a" * 1_000_000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n",
    ],
)
def test_heads_that_are_too_large(live, head):
    with live.connect() as sock:
        sock.sendall(head)
        answer = read_all(sock)
    assert status_of(answer) == 431 and error_of(answer)["message"]


def test_a_head_of_many_headers_is_answered(live):
    answer = live.raw(GET + b"".join(b"X-%d: a\r\n" % i for i in range(200)) + b"\r\n")
    assert status_of(answer) == 431 and error_of(answer)["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    "data",
    [
        b"\x16\x03\x01\x02\x00\x01",
        b"GET / HTTP/9.9\r\n\r\n",
        b"nothing\r\n\r\n",
        b"GET /\xff HTTP/1.1\r\n\r\n",
        GET + b"Content-Length: -1\r\n\r\n",
        GET + b"Content-Length: 1\r\nContent-Length: 2\r\n\r\n",
        GET + b"Transfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\nhello",
    ],
)
def test_bytes_that_are_not_http(live, data):
    answer = live.raw(data)
    assert status_of(answer) == 400 and error_of(answer)["message"]


def test_a_slow_head(make_server):
    live = make_server(ServerSettings(header_seconds=0.3))
    assert status_of(live.raw(b"GET /health HT")) == 408
    assert status_of(live.raw(b"")) == 408
    with live.connect() as sock:  # sending a byte from time to time does not prevent it
        answer = b""
        for byte in GET:
            try:
                sock.sendall(bytes([byte]))
            except OSError:
                break
            time.sleep(0.02)
        answer = read_all(sock)
    assert not answer or status_of(answer) == 408


def test_a_slow_second_head(make_server):
    live = make_server(ServerSettings(header_seconds=0.3))
    with live.connect() as sock:
        sock.sendall(GET + b"\r\n")
        assert b"200 OK" in sock.recv(65536)
        sock.sendall(b"GET /hea")
        assert status_of(read_all(sock)) == 408
    with live.connect() as sock:
        sock.sendall(GET + b"\r\n")
        sock.recv(65536)
        sock.sendall(b"\r\n")  # an empty line instead of a head
        assert read_all(sock) == b""


def test_idle_connections_are_closed(make_server):
    live = make_server(ServerSettings(keep_alive_seconds=0.2))
    with live.connect() as sock:
        sock.sendall(GET + b"\r\n")
        assert b"200 OK" in sock.recv(65536)
        assert read_all(sock) == b""


def test_split_heads_and_pipelined_requests(live):
    with live.connect() as sock:
        sock.sendall(b"GET /heal")
        time.sleep(0.05)
        sock.sendall(b"th HTTP/1.1\r\nHost: localhost\r\n\r\n" + GET + b"Connection: close\r\n\r\n")
        assert read_all(sock).count(b"200 OK") == 2


def test_too_many_connections(make_server):
    live = make_server(ServerSettings(max_connections=2))
    with live.connect() as first, live.connect() as second:
        for sock in (first, second):
            sock.sendall(GET + b"\r\n")
            assert b"200 OK" in sock.recv(65536)
        answer = live.raw(b"")
        assert status_of(answer) == 503 and b"Retry-After" in answer
    wait_for(lambda: not live.server.server_state.connections)
    assert b"200 OK" in live.raw(GET + b"Connection: close\r\n\r\n")


def test_a_client_that_does_not_read_stalls_nobody_and_is_disconnected(make_server):
    """Its text is longer than all buffers in between; the engine continues, and unread output is merged into one."""
    live = make_server(ServerSettings(write_seconds=1.0), script=lambda request: "x" * 20_000, context=30_000, step_seconds=0.0)
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.connect(("127.0.0.1", live.port))
        body = json.dumps({"prompt": "slow", "stream": True, "max_tokens": 20_000}).encode()
        head = (
            b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
        )
        sock.sendall(head % len(body) + body)
        wait_for(lambda: live.engine.running == 1)
        actual = live.client.post("/v1/completions", json={"prompt": "fast", "max_tokens": 50})
        assert actual.json()["choices"][0]["text"] == "x" * 50
        wait_for(lambda: live.engine.admitted == 0)
        wait_for(lambda: not [c for c in live.server.server_state.connections if c.cycle and not c.cycle.response_complete])


def test_a_slow_reader_gets_the_whole_text(make_server):
    text = "".join(chr(ord("a") + i % 26) for i in range(5000))
    live = make_server(script=lambda request: text, context=10_000)
    with live.client.stream("POST", "/v1/completions", json={"prompt": "x", "stream": True, "max_tokens": 5000}) as response:
        actual = []
        for line in response.iter_lines():
            if len(actual) % 500 == 0:
                time.sleep(0.02)
            if line.startswith("data: {"):
                actual.append(json.loads(line[6:])["choices"][0]["text"])
    assert "".join(actual) == text
