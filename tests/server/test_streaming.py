"""Streams: the same text as without, OpenAI's chunks, clients that disconnect."""

from __future__ import annotations

import json
import socket
import threading

import pytest

from support.live_server import LiveServer, wait_for

MESSAGES = [{"role": "user", "content": "Tell me"}]
EMOJI = "Zwölf 😀👩‍👩‍👧‍👦 中文 \n\n```py\nx = '\u2028'\n```\t end"


def chunks(response) -> list[dict]:
    """The chunks of a complete stream."""
    assert response.status_code == 200, response.text
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    events = response.content.decode().split("\n\n")
    assert events[-1] == "" and events[-2] == "data: [DONE]"
    assert all(event.startswith("data: ") and "\n" not in event for event in events[:-1])
    return [json.loads(event[6:]) for event in events[:-2]]


def texts(result: list[dict], n: int = 1) -> list[str]:
    pieces = [[] for _ in range(n)]
    for chunk in result:
        for choice in chunk["choices"]:
            pieces[choice["index"]].append(choice["delta"].get("content", "") if "delta" in choice else choice["text"])
    whole = ["".join(p) for p in pieces]
    assert all("\ufffd" not in text for text in whole)
    return whole


@pytest.fixture(scope="module")
def emoji(byte_tokenizer):
    from support.fake_engine import FakeEngine

    with LiveServer(FakeEngine(byte_tokenizer, script=lambda request: EMOJI)) as live:
        yield live


@pytest.mark.parametrize("stop", [None, "py", ["👩‍👩", "end"], ["nothing like it"]])
@pytest.mark.parametrize("limit", [None, 1, 9, 11, 40])
def test_a_chat_stream_equals_the_whole_answer(emoji, stop, limit):
    body = {"messages": MESSAGES, "stop": stop, "max_tokens": limit}
    whole = emoji.client.post("/v1/chat/completions", json=body).json()
    actual = chunks(
        emoji.client.post("/v1/chat/completions", json={**body, "stream": True, "stream_options": {"include_usage": True}})
    )
    choice = whole["choices"][0]
    assert texts(actual) == [choice["message"]["content"]]
    assert actual[-1]["choices"] == [] and actual[-1]["usage"] == whole["usage"]
    assert all(chunk["usage"] is None and chunk["object"] == "chat.completion.chunk" for chunk in actual[:-1])
    assert actual[-2]["choices"][0]["finish_reason"] == choice["finish_reason"]
    assert actual[-2]["choices"][0]["stop_reason"] == choice["stop_reason"]
    assert actual[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert len({chunk["id"] for chunk in actual}) == 1 and {chunk["model"] for chunk in actual} == {"fake-model"}


def test_a_completion_stream_equals_the_whole_answer(emoji):
    body = {"prompt": ["one", "two"], "n": 2, "max_tokens": 30, "echo": True}
    whole = emoji.client.post("/v1/completions", json=body).json()
    assert [choice["index"] for choice in whole["choices"]] == [0, 1, 2, 3]
    assert [choice["text"][:3] for choice in whole["choices"]] == ["one", "one", "two", "two"]
    actual = chunks(
        emoji.client.post("/v1/completions", json={**body, "stream": True, "stream_options": {"include_usage": True}})
    )
    assert texts(actual, 4) == [choice["text"] for choice in whole["choices"]]
    assert actual[-1]["usage"] == whole["usage"] and whole["usage"]["prompt_tokens"] == 6


def test_without_include_usage_there_is_no_usage(emoji):
    actual = chunks(emoji.client.post("/v1/chat/completions", json={"messages": MESSAGES, "stream": True}))
    assert all("usage" not in chunk for chunk in actual) and actual[-1]["choices"][0]["finish_reason"] == "stop"


def test_several_answers_stream_concurrently(live):
    body = {"messages": MESSAGES, "n": 3, "seed": 5}
    whole = live.client.post("/v1/chat/completions", json=body).json()
    actual = chunks(live.client.post("/v1/chat/completions", json={**body, "stream": True}))
    assert texts(actual, 3) == [choice["message"]["content"] for choice in whole["choices"]]
    assert len(set(texts(actual, 3))) == 3
    order = [chunk["choices"][0]["index"] for chunk in actual]
    assert order != sorted(order)


@pytest.mark.parametrize(
    "path,rest",
    [
        ("/v1/chat/completions", {"messages": MESSAGES, "logprobs": True, "top_logprobs": 2}),
        ("/v1/completions", {"prompt": "x", "logprobs": 2, "max_tokens": 40}),
    ],
)
def test_log_probabilities_in_streams(emoji, path, rest):
    whole = emoji.client.post(path, json=rest).json()["choices"][0]
    actual = chunks(emoji.client.post(path, json={**rest, "stream": True}))
    streamed = [choice["logprobs"] for chunk in actual for choice in chunk["choices"] if choice["logprobs"]]
    if "messages" in rest:
        entries = [entry for piece in streamed for entry in piece["content"]]
        assert entries == whole["logprobs"]["content"]
        assert b"".join(bytes(entry["bytes"]) for entry in entries).decode().startswith(EMOJI)
        assert all(len(entry["top_logprobs"]) == 2 for entry in entries)
        assert not any("\ufffd" in entry["token"] for entry in entries)
    else:
        for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
            assert [value for piece in streamed for value in piece[name]] == whole["logprobs"][name]
        assert len(whole["logprobs"]["tokens"]) == 40


# Clients that disconnect.


def post(sock: socket.socket, path: str, body: dict) -> None:
    data = json.dumps(body).encode()
    head = b"POST %s HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
    sock.sendall(head % (path.encode(), len(data)) + data)


LONG = {"prompt": "x", "max_tokens": 3000, "ignore_eos": True}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("frozen", [False, True])  # in the queue or in prefill: nothing was sent yet
def test_a_disconnect_frees_the_slot(make_server, stream, frozen):
    live = make_server(step_seconds=0.001)
    live.engine.frozen = frozen
    with live.connect() as sock:
        post(sock, "/v1/completions", {**LONG, "n": 2, "stream": stream})
        wait_for(lambda: live.engine.running == 2)
        if stream and not frozen:
            assert b"data: " in sock.recv(65536)
    steps = live.engine.steps
    wait_for(lambda: live.engine.admitted == 0 and live.engine.running == 0)
    assert live.engine.ended == ["cancelled"] * 2 and live.engine.steps - steps < 1000
    live.engine.frozen = False
    assert live.client.post("/v1/completions", json={"prompt": "x"}).status_code == 200


def test_a_disconnect_changes_no_other_text(make_server):
    live = make_server(step_seconds=0.001)
    body = {"prompt": "mine", "max_tokens": 200, "ignore_eos": True}
    alone = live.client.post("/v1/completions", json=body).json()["choices"][0]["text"]
    results = []
    threads = [
        threading.Thread(
            target=lambda: results.append(live.client.post("/v1/completions", json=body).json()["choices"][0]["text"])
        )
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for _ in range(20):
        with live.connect() as sock:
            post(sock, "/v1/completions", {**LONG, "stream": True})
            sock.recv(100)
    for thread in threads:
        thread.join()
    assert results == [alone] * 4
    wait_for(lambda: live.engine.admitted == 0)
    assert live.engine.ended.count("cancelled") == 20


def test_a_disconnect_after_done(live):
    with live.connect() as sock:
        post(sock, "/v1/completions", {"prompt": "x", "stream": True, "max_tokens": 2})
        data = b""
        while b"[DONE]" not in data:
            data += sock.recv(65536)


def test_a_connection_is_reused_after_a_stream(live):
    with live.connect() as sock:
        for _ in range(3):
            post(sock, "/v1/completions", {"prompt": "x", "stream": True, "max_tokens": 2})
            data = b""
            while not data.endswith(b"0\r\n\r\n"):
                data += sock.recv(65536)
            assert data.startswith(b"HTTP/1.1 200 OK") and b"[DONE]" in data
