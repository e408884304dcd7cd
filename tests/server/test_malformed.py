"""Malformed HTTP: each request gets one status line and a closed connection, and no request can be smuggled in a body."""

from __future__ import annotations

import json
import socket

import pytest

from deepseek_optimizer.server.settings import ServerSettings
from support.live_server import read_all, wait_for

HOST = b"Host: localhost\r\n"
GET = b"GET /health HTTP/1.1\r\n" + HOST
POST = b"POST /v1/completions HTTP/1.1\r\n" + HOST + b"Content-Type: application/json\r\n"
CHUNKED = POST + b"Transfer-Encoding: chunked\r\n\r\n"
HIDDEN = b"GET /metrics HTTP/1.1\r\n" + HOST + b"\r\n"  # must not be parsed as a request


def statuses(answer: bytes) -> list[int]:
    return [int(part[:3]) for part in answer.split(b"HTTP/1.1 ")[1:]]


MALFORMED = {
    "coding that is not known": (POST + b"Transfer-Encoding: xchunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n", 400),
    "two codings": (POST + b"Transfer-Encoding: gzip, chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n", 501),
    "two codings in two fields": (POST + b"Transfer-Encoding: gzip\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 501),
    "chunked twice": (POST + b"Transfer-Encoding: chunked, chunked\r\n\r\n0\r\n\r\n", 400),
    "chunked twice in two fields": (POST + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400),
    "chunked and then another": (POST + b"Transfer-Encoding: chunked, gzip\r\n\r\n0\r\n\r\n", 400),
    "no coding": (POST + b"Transfer-Encoding:\r\n\r\n0\r\n\r\n", 400),
    "identity": (POST + b"Transfer-Encoding: identity\r\n\r\n", 400),
    "a coding and a length": (POST + b"Transfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n0\r\n\r\n", 400),
    "a length and a coding": (POST + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400),
    "a length and a coding not known": (POST + b"Content-Length: 5\r\nTransfer-Encoding: xchunked\r\n\r\n0\r\n\r\n", 400),
    "chunks in HTTP/1.0": (CHUNKED.replace(b"HTTP/1.1", b"HTTP/1.0") + b"0\r\n\r\n", 400),
    "chunk of -1": (CHUNKED + b"-1\r\nx\r\n", 400),
    "chunk of +5": (CHUNKED + b"+5\r\nhello\r\n0\r\n\r\n", 400),
    "chunk of 0x5": (CHUNKED + b"0x5\r\nhello\r\n0\r\n\r\n", 400),
    "chunk of 17 digits": (CHUNKED + b"1" * 17 + b"\r\nx", 400),
    "chunk of 17 digits, 0 at first": (CHUNKED + b"f" * 17 + b"\r\nx", 400),
    "chunk of no digits": (CHUNKED + b"\r\nhello\r\n0\r\n\r\n", 400),
    "chunk with a space": (CHUNKED + b"5 \r\nhello\r\n0\r\n\r\n", 400),
    "chunks with LF alone": (CHUNKED + b"5\nhello\n0\n\n", 400),
    "chunk that is longer than it says": (CHUNKED + b"5\r\nhelloX\r\n0\r\n\r\n", 400),
    "trailer that is none": (CHUNKED + b"0\r\nnot a field\r\n\r\n", 400),
    "length of -1": (POST + b"Content-Length: -1\r\n\r\n", 400),
    "length of +3": (POST + b"Content-Length: +3\r\n\r\n{} ", 400),
    "two lengths": (POST + b"Content-Length: 3\r\nContent-Length: 4\r\n\r\n{}  ", 400),
    "lengths in a list": (POST + b"Content-Length: 3, 3\r\n\r\n{} ", 400),
    "length beyond all": (POST + b"Content-Length: 99999999999999999999999\r\n\r\n", 400),
    "field over two lines": (GET + b"X-A: a\r\n b\r\n\r\n", 400),
    "name with a space": (GET + b"X-A : b\r\n\r\n", 400),
    "length with a space before it": (POST + b" Content-Length: 3\r\n\r\n{} ", 400),
    "NUL in a field": (GET + b"X-A: a\x00b\r\n\r\n", 400),
    "CR in a field": (GET + b"X-A: a\rb\r\n\r\n", 400),
    "lines with LF alone": (b"GET /health HTTP/1.1\nHost: localhost\n\n", 400),
    "method that is none": (b"BREW /health HTTP/1.1\r\n" + HOST + b"\r\n", 400),
    "version that is none": (b"GET /health HTTP/7.7\r\n" + HOST + b"\r\n", 400),
    "HTTP/2": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400),
    "address that is none": (b"GET http://[::1/ HTTP/1.1\r\n" + HOST + b"\r\n", 400),
    "CONNECT": (b"CONNECT localhost:80 HTTP/1.1\r\n" + HOST + b"\r\n", 400),
    "TLS": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 400),
    "no Host": (b"GET /health HTTP/1.1\r\nConnection: close\r\n\r\n", 403),
    "HTTP/0.9": (b"GET /health\r\n\r\n", 403),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_requests_get_one_answer_and_are_closed(live, name):
    data, status = MALFORMED[name]
    answer = live.raw(data + HIDDEN)
    assert statuses(answer) == [status]
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["message"] and b"connection: close" in answer.lower()


@pytest.mark.parametrize("name", [name for name in MALFORMED if MALFORMED[name][0].startswith((POST, CHUNKED[:40]))])
def test_malformed_requests_wait_for_earlier_answers(live, name):
    data, status = MALFORMED[name]
    body = json.dumps({"prompt": "x" * 50, "max_tokens": 20}).encode()
    good = POST + b"Content-Length: %d\r\n\r\n" % len(body) + body
    assert statuses(live.raw(good + GET + b"\r\n" + data + HIDDEN)) == [200, 200, status]


def test_chunks_that_arrive_later(live):
    with live.connect() as sock:
        sock.sendall(CHUNKED)
        wait_for(lambda: any(c.cycle and c.cycle.more_body for c in live.server.server_state.connections if c.cycle))
        sock.sendall(b"-1\r\n")
        assert statuses(read_all(sock)) == [400]


def test_protocol_upgrades_are_answered_and_the_last(live):
    for more in (b"\r\n", b"Content-Length: 5\r\n\r\nhello"):
        assert statuses(live.raw(GET + b"Connection: Upgrade\r\nUpgrade: websocket\r\n" + more + HIDDEN)) == [200]


@pytest.mark.parametrize("size", [2 << 20, 20 << 20])
def test_a_too_large_body_sent_at_once_gets_an_answer(live, size):
    for _ in range(3):
        with live.connect() as sock:
            sock.sendall(POST + b"Content-Length: %d\r\n\r\n" % size)
            sock.sendall(b"x" * size)
            sock.shutdown(socket.SHUT_WR)
            assert statuses(read_all(sock)) == [413]


def test_a_too_large_head_sent_at_once_gets_an_answer(live):
    for _ in range(3):
        with live.connect() as sock:
            sock.sendall(GET + b"X-A: " + b"a" * (8 << 20) + b"\r\n\r\n")
            assert statuses(read_all(sock)) == [431]


def test_an_excess_connection_that_sends_at_once_gets_an_answer(make_server):
    live = make_server(ServerSettings(max_connections=1))
    with live.connect() as first:
        first.sendall(GET + b"\r\n")
        assert b"200 OK" in first.recv(65536)
        with live.connect() as second:
            second.sendall(GET + b"X-A: " + b"a" * 100_000 + b"\r\n\r\n")
            assert statuses(read_all(second)) == [503]


def test_lingering_ends(make_server):
    """It ends when the client closes, is silent, after a time, and after a number of bytes."""
    live = make_server(ServerSettings(body_seconds=0.5, max_body_bytes=100, max_body_bytes_total=1 << 20))
    connections = live.server.server_state.connections
    refused = POST + b"Content-Length: 1000000000\r\n\r\n"
    with live.connect() as sock:
        sock.sendall(refused)
        assert statuses(read_all(sock)) == [413]
        wait_for(lambda: not connections, 5)  # although the client keeps it open
    with live.connect() as sock:
        sock.sendall(refused)
        assert statuses(read_all(sock)) == [413]
        with pytest.raises(OSError):  # reset, once the server has received its maximum
            for _ in range(200):
                sock.sendall(b"x" * (1 << 20))
    with live.connect() as sock:
        sock.sendall(refused)
        assert statuses(read_all(sock)) == [413]
    wait_for(lambda: not connections, 0.4)


def test_head_is_answered_as_get_without_the_body(live):
    for path in ("/", "/health", "/ready", "/metrics", "/v1/models", "/v1/files", "/openapi.json"):
        actual, whole = live.client.head(path), live.client.get(path)
        assert actual.status_code == whole.status_code == 200, path
        assert actual.content == b"" and actual.headers["content-type"] == whole.headers["content-type"]
        if path != "/metrics":  # it counts these requests too
            assert int(actual.headers["content-length"]) == len(whole.content)
    assert live.client.head("/v1/completions").status_code == 405
    assert live.client.head("/nothing").status_code == 404
    answer = live.raw(b"HEAD /health HTTP/1.1\r\n" + HOST + b"\r\n" + GET + b"Connection: close\r\n\r\n")
    assert statuses(answer) == [200, 200] and answer.count(b'{"status"') == 1
