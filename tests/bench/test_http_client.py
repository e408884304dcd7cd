"""Parsing of a connection's bytes and their arrival times, and a server as a separate process."""

from __future__ import annotations

import asyncio
import json
import sys

import pytest

from deepseek_optimizer.bench.http_client import ask, reply_of, request_bytes, send
from deepseek_optimizer.bench.served import Served, parsed
from deepseek_optimizer.errors import BackendError

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream; charset=utf-8\r\nTransfer-Encoding: chunked\r\n\r\n"


def event(text: str, index: int = 0) -> bytes:
    return b"data: " + json.dumps({"choices": [{"index": index, "text": text}]}).encode() + b"\n\n"


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


def stream() -> bytes:
    usage = b'data: {"choices": [], "usage": {"completion_tokens": 3}}\n\n'
    parts = [event("Zwölf"), event("x", 1) + event(" böse"), event(""), usage, b"data: [DONE]\n\n"]
    return HEAD + b"".join(map(chunk, parts)) + b"0\r\n\r\n"


def test_streams_without_token_counts():
    reply = reply_of([(0.0, HEAD + chunk(event("x")) + b"0\r\n\r\n")])
    assert reply.usage is None and reply.text == "x" and reply.streamed and reply.whole and not reply.done


def test_events_as_other_servers_write_them():
    """Lines that end in CR LF, no space after the colon, names of events, reasoning."""
    events = b'event: x\r\ndata:{"choices": [{"delta": {"reasoning_content": "a"}}]}\r\n\r\ndata: {"choices": []}\n\n'
    reply = reply_of([(1.0, HEAD + chunk(events) + b"0\r\n\r\n")])
    assert [data["choices"] for _, data in reply.events] == [[{"delta": {"reasoning_content": "a"}}], []]
    assert reply.pieces == [1.0] and reply.text == ""


@pytest.mark.parametrize("size", [1, 2, 7, 50, 10_000])
def test_an_event_arrives_with_its_last_byte(size):
    data = stream()
    pieces = [(float(at), data[at : at + size]) for at in range(0, len(data), size)]
    reply = reply_of(pieces, -1.0)
    assert (reply.status, reply.whole, reply.done, reply.sent) == (200, True, True, -1.0)
    assert reply.text == "Zwölf böse" and reply.usage == {"completion_tokens": 3}
    ends = [len(HEAD) + len(chunk(event("Zwölf")))]
    ends.append(ends[0] + len(chunk(event("x", 1) + event(" böse"))))
    assert reply.chunks == [((end - 1) // size * size, text) for end, text in zip(ends, ("Zwölf", " böse"), strict=True)]


@pytest.mark.parametrize("cut", range(0, len(stream()), 13))
def test_interrupted_responses_are_incomplete(cut):
    reply = reply_of([(0.0, stream()[:cut])])
    assert not reply.whole and not reply.done
    assert "Zwölf böse".startswith(reply.text) if reply.status else cut < len(HEAD)


def test_an_answer_of_known_length():
    body = json.dumps({"choices": [{"index": 0, "message": {"content": "yes"}}], "usage": {"total_tokens": 2}}).encode()
    head = b"HTTP/1.1 429 Too Many Requests\r\ncontent-length: %d\r\nRetry-After: 3\r\n\r\n" % len(body)
    whole, half = (reply_of([(0.0, head), (1.0, body[:length])]) for length in (len(body), 5))
    assert (whole.status, whole.text, whole.whole, whole.retry_after) == (429, "yes", True, 3.0)
    assert whole.usage == {"total_tokens": 2} and not whole.done and not half.whole


def test_over_sockets():
    """An answer, a client that disconnects, and no server."""
    gone = []

    async def serve(reader, writer):
        head = await reader.readuntil(b"\r\n\r\n")
        body = await reader.readexactly(2) if head.startswith(b"POST") else b""
        writer.write(HEAD + chunk(event(f"{head.split()[1].decode()} {body.decode()}")))
        if b"/stay" in head:
            try:
                await reader.read()
            except ConnectionError:
                pass
            gone.append(True)
        else:
            writer.write(b"0\r\n\r\n")
        writer.close()

    async def main():
        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        assert (await ask(port, "/a", {})).text == "/a {}"
        assert (await ask(port, "/b", key="k")).text == "/b "
        exchange = await send(port, "/stay", {})
        await exchange.begun()
        assert exchange.received and not exchange.over
        exchange.leave()
        reply = await exchange.reply()
        assert exchange.over and reply.text == "/stay {}" and not reply.whole
        server.close()
        await server.wait_closed()
        with pytest.raises(OSError):
            await ask(port, "/")

    asyncio.run(asyncio.wait_for(main(), 20))
    assert gone


def test_the_key_is_sent():
    assert b"Authorization: Bearer k\r\n" in request_bytes("/", key="k") and b"Authorization" not in request_bytes("/")


def test_prometheus_samples():
    text = '# HELP a b\na_total{x="1",y="z"} 2.0\na_total{x="2",y="z"} 3.5\nb 1e3\nc_bucket{le="+Inf"} 4\n'
    actual = parsed(text)
    assert actual["a_total"] == 5.5 and actual["a_total{x=2}"] == 3.5 and actual["a_total{y=z}"] == 5.5
    assert actual["b"] == 1000 and actual["c_bucket{le=+Inf}"] == 4


def test_a_server_that_does_not_start_says_why(tmp_path):
    with pytest.raises(BackendError, match="nowhere"):
        Served(tmp_path / "nowhere").__enter__()


def test_a_server_that_does_not_listen_is_stopped(tmp_path, monkeypatch):
    served = Served(tmp_path)
    served.command = [sys.executable, "-c", "import time; print('still loading', flush=True); time.sleep(100)"]
    wait = served._wait
    monkeypatch.setattr(served, "_wait", lambda seconds: wait(0.5))
    with pytest.raises(BackendError, match="still loading"):
        served.__enter__()
    assert served.process.poll() is not None
