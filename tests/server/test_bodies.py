"""Invalid request bodies: a 4xx in OpenAI's error format, and the server continues."""

from __future__ import annotations

import json
import time

import pytest

from deepseek_optimizer.server.http.json_body import TEXT_BODY
from deepseek_optimizer.server.settings import ServerSettings
from support.live_server import assert_error

PATHS = ["/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/embeddings", "/tokenize", "/detokenize"]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"nothing",
        b"[]",
        b'[{"prompt": "x"}]',
        b"null",
        b"true",
        b"1",
        b'"text"',
        b"\xff\xfe{}",
        b"\xef\xbb\xbf{}",
        b'{"prompt": NaN}',
        b'{"temperature": Infinity}',
        b'{"prompt": "\\ud800"}',
        b'{"prompt": "\\udc00\\ud800"}',
        b'{"a": 1e999}',
        b'{"prompt": "x",}',
        b"{'prompt': 'x'}",
        b'{"prompt": "\x00"}',
    ],
)
def test_bodies_that_are_not_json_objects(refused, path, body):
    refused(path, body)


@pytest.mark.parametrize("body", [b"[" * 10_000 + b"]" * 10_000, b'{"a":' * 10_000 + b"1" + b"}" * 10_000, b"[" * 500_000])
def test_json_of_ten_thousand_levels(refused, body):
    refused("/v1/chat/completions", body)


def test_json_that_is_deeper_than_allowed_but_not_too_deep_to_parse(refused):
    refused("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}], "metadata": deep(200)})


def deep(levels):
    value = "x"
    for _ in range(levels):
        value = {"a": [value]}
    return value


def test_a_body_over_the_limit(live, refused):
    refused("/v1/completions", json.dumps({"prompt": "x" * (1 << 20)}), 413)


def test_a_chunked_body_over_the_limit(client):
    def pieces():
        yield b'{"prompt": "'
        for _ in range(40):
            yield b"x" * 65536

    actual = client.post("/v1/completions", content=pieces(), headers={"content-type": "application/json"})
    assert_error(actual, 413)


def test_a_chunked_body_within_it(client):
    body = json.dumps({"prompt": "hello", "max_tokens": 4}).encode()
    actual = client.post(
        "/v1/completions", content=iter([body[:5], body[5:]]), headers={"content-type": "application/json; charset=utf-8"}
    )
    assert actual.status_code == 200, actual.text


@pytest.mark.parametrize(
    "kind",
    [
        "text/plain",
        "application/x-www-form-urlencoded",
        "multipart/form-data; boundary=x",
        "",
        "json",
        "application/json; charset=latin-1",
        "application/xml",
    ],
)
def test_another_content_type(client, kind):
    actual = client.post("/v1/completions", content=b'{"prompt": "x"}', headers={"content-type": kind})
    assert_error(actual, 415)


def test_a_compressed_body(refused):
    refused("/v1/completions", b'{"prompt": "x"}', 415, headers={"content-encoding": "gzip"})


def test_a_slow_body(make_server):
    live = make_server(ServerSettings(body_seconds=0.3))
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n{"
    answer = live.raw(head)
    assert answer.startswith(b"HTTP/1.1 408 ") and b'"error"' in answer and b"connection: close" in answer.lower()


@pytest.mark.parametrize(("settings", "limit"), [(None, TEXT_BODY), (ServerSettings(max_body_bytes=5 << 20), 5 << 20)])
def test_limits_of_a_model_that_reads_text_only(make_server, settings, limit):
    live = make_server(settings)
    assert live.client.get("/v1/models").json()["data"][0]["max_body_bytes"] == limit
    body = b'{"prompt": "x", "max_tokens": 1}'
    for length, status in ((limit, 200), (limit + 1, 413)):
        content = body.ljust(length)
        answer = live.client.post("/v1/completions", content=content, headers={"content-type": "application/json"})
        assert answer.status_code == status


def test_concurrent_bodies_share_a_limit(make_server):
    live = make_server(ServerSettings(max_body_bytes=1 << 20, max_body_bytes_total=1 << 20))
    head = (
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 1000000\r\n\r\n"
    )
    with live.connect() as first:
        first.sendall(head + b"x" * 900_000)
        time.sleep(0.3)  # until it is received; the limit for the next one depends only on that
        body = json.dumps({"prompt": "x" * 500_000})
        actual = live.client.post("/v1/completions", content=body, headers={"content-type": "application/json"})
        assert_error(actual, 503)
        assert actual.headers["retry-after"]
    actual = live.client.post("/v1/completions", json={"prompt": "hello", "max_tokens": 2})
    assert actual.status_code == 200


def test_a_client_that_disconnects_during_its_body(live):
    with live.connect() as sock:
        sock.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 50\r\n\r\n{"
        )


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"prompt": [[1]] * 60_000}, "lists and objects"),
        ({"prompt": "x", "metadata": [[]] * 60_000}, "lists and objects"),
        ({"prompt": "x", "metadata": {str(n): 1 for n in range(6_000)}}, "fields"),
        ({f"field{n}": 1 for n in range(6_000)}, "fields"),
        ({"prompt": ["x"] * 200_000}, "200000 answers"),
        ({"prompt": [1] * 200_000}, "model's maximum context length"),
        ({"prompt": [[1] * 5_000]}, "model's maximum context length"),
    ],
)
def test_bodies_with_too_many_parts_are_rejected_before_validation(live, refused, monkeypatch, body, words):
    """Validating every part, and writing an error for each invalid one, would make all other requests wait."""
    from deepseek_optimizer.server.protocol import base

    errors = []
    real = base.field_error
    monkeypatch.setattr(base, "field_error", lambda error, given: errors.append(error.error_count()) or real(error, given))
    assert words in refused("/v1/completions", body).text
    assert sum(errors) < 200


def test_large_bodies_take_turns(live, client):
    state = live.app.state.server
    before = state.bodies.queue.counts.jobs["done"]
    assert client.post("/v1/completions", json={"prompt": "x", "max_tokens": 1}).status_code == 200
    assert state.bodies.queue.counts.jobs["done"] == before
    body = {"prompt": "x", "max_tokens": 1, "metadata": "x" * 100_000}
    assert client.post("/v1/completions", json=body).status_code == 200
    assert state.bodies.queue.counts.jobs["done"] == before + 2  # one job to parse it, and one to validate it
