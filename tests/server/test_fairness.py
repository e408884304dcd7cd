"""A key can slow down only itself: requests of another key are answered while the first key's work is still queued."""

from __future__ import annotations

import copy
import json
import os
import signal
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from deepseek_optimizer.server.keys import ApiKeys
from deepseek_optimizer.server.settings import ServerSettings
from deepseek_optimizer.server.tokens.prompt_size import PromptSize, bytes_of_token
from deepseek_optimizer.server.tokens.tokenizing import SHORT
from support.fake_engine import FakeEngine
from support.live_server import LiveServer, assert_error, wait_for

CHATS, TEXTS = "/v1/chat/completions", "/v1/completions"
SCHEMA = {"type": "object", "properties": {"n": {"enum": [7]}}, "required": ["n"], "additionalProperties": False}
A, B = ({"Authorization": f"Bearer {key}"} for key in ("key-a", "key-b"))


class Held:
    """Blocks work of key a once it has started, until it is released."""

    def __init__(self):
        self.begun, self.go = 0, threading.Event()

    def wait(self):
        self.begun += 1
        assert self.go.wait(60)


@pytest.fixture
def held():
    made = Held()
    yield made
    made.go.set()


@pytest.fixture
def server(byte_tokenizer, held):
    """A server with two keys; texts that contain "hold" are tokenized when `held` releases them."""

    class Slow(type(byte_tokenizer)):
        def __call__(self, text, *args, **kwargs):
            if any("hold" in one for one in ([text] if isinstance(text, str) else text)):
                held.wait()
            return super().__call__(text, *args, **kwargs)

    tokenizer = copy.deepcopy(byte_tokenizer)
    tokenizer.__class__ = Slow
    with LiveServer(FakeEngine(tokenizer), ServerSettings(keys=ApiKeys(["key-a", "key-b"]), grammar_seconds=20)) as live:
        yield live
        held.go.set()


@pytest.fixture
def attack(server, held):
    """attack(path, **sent): key a sends the request eight times at once; answers arrive when `held` releases them."""
    with ThreadPoolExecutor(8) as pool:

        def begin(path, **sent):
            futures = [pool.submit(server.client.post, path, headers=A, **sent) for _ in range(8)]
            wait_for(lambda: held.begun, 30)
            return futures

        yield begin
        held.go.set()


def body(form=None):
    fields = {} if form is None else {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": form}}}
    return {"messages": [{"role": "user", "content": "x"}], "max_tokens": 200, **fields}


def test_large_prompts(server, held, attack):
    answers = attack(TEXTS, json={"prompt": "hold " * (SHORT // 4), "max_tokens": 1})
    assert server.client.post(CHATS, headers=B, json=body()).status_code == 200
    assert server.client.post(TEXTS, headers=B, json={"prompt": "x"}).status_code == 200
    assert held.begun == 1 and not any(answer.done() for answer in answers)
    held.go.set()
    assert {answer.result().status_code for answer in answers} == {400}  # longer than the context
    assert held.begun == 8


def test_many_small_prompts(server, held):
    """Within a size class, the other key waits for at most one text."""
    order = []

    def send(key, name, text):
        assert server.client.post(TEXTS, headers=key, json={"prompt": text, "max_tokens": 1}).status_code == 200
        order.append(name)

    with ThreadPoolExecutor(9) as pool:
        pool.submit(send, A, "first", "hold")
        wait_for(lambda: held.begun)
        futures = [pool.submit(send, A, "a", "x") for _ in range(7)]
        queue = server.app.state.server._tokenizing.queues[0]
        wait_for(lambda: queue.waiting == 7)
        futures.append(pool.submit(send, B, "b", "x"))
        wait_for(lambda: queue.waiting == 8)
        turns = [key for key, waiters in queue._waiting.items() for _ in waiters]
        assert len(turns) == 8 and len(queue._waiting) == 2
        held.go.set()
        for future in futures:
            future.result()
    assert len(order) == 9


def test_large_schemas(server, held, attack, monkeypatch):
    grammars = server.app.state.server.grammars
    compile_ = grammars.compile

    def slow(source):
        if "hold" in source.text:
            held.wait()
        return compile_(source)

    monkeypatch.setattr(grammars, "compile", slow)
    answers = attack(CHATS, json=body({"enum": ["hold"]}))
    actual = server.client.post(CHATS, headers=B, json=body(SCHEMA))
    assert actual.status_code == 200, actual.text
    assert json.loads(actual.json()["choices"][0]["message"]["content"]) == {"n": 7}
    assert held.begun == 1 and not any(answer.done() for answer in answers)
    held.go.set()
    assert {answer.result().status_code for answer in answers} == {200}


def test_documents(server, held, attack, monkeypatch):
    reader = server.app.state.server.reader
    call = reader.workers.call

    def slow(payload):
        if payload["name"] == "hold.txt":
            held.wait()
        return call(payload)

    monkeypatch.setattr(reader.workers, "call", slow)
    answers = attack("/v1/files", files={"file": ("hold.txt", b"one")}, data={"purpose": "user_data"})
    actual = server.client.post("/v1/files", headers=B, files={"file": ("b.txt", b"two")}, data={"purpose": "user_data"})
    assert actual.status_code == 200, actual.text
    assert server.client.post(CHATS, headers=B, json=body()).status_code == 200
    assert held.begun == 1 and not any(answer.done() for answer in answers)
    held.go.set()
    assert {answer.result().status_code for answer in answers} == {200}


def test_queued_work_of_disconnected_clients_never_starts(server, held):
    text = b'{"prompt": "hold"}'
    lines = [f"POST {TEXTS} HTTP/1.1", f"Host: 127.0.0.1:{server.port}", "Authorization: Bearer key-a",
             "Content-Type: application/json", f"Content-Length: {len(text)}", "", ""]  # fmt: skip
    message = "\r\n".join(lines).encode() + text
    connections: list[socket.socket] = []
    for _ in range(5):
        connections.append(server.connect())
        connections[-1].sendall(message)
    queue = server.app.state.server._tokenizing.queues[0]
    wait_for(lambda: held.begun == 1 and queue.waiting == 4)
    for connection in connections:
        connection.close()
    wait_for(lambda: queue.waiting == 0)
    assert queue.counts.jobs["left"] == 4
    held.go.set()
    wait_for(lambda: server.engine.admitted == 0)
    wait_for(lambda: queue.counts.jobs["done"] == 1)
    assert held.begun == 1


def test_impossible_prompts_are_rejected_before_tokenizing(server, held):
    max_bytes = server.app.state.server.prompt_size.max_bytes
    assert max_bytes == server.engine.context * len("<|assistant|>")
    text = "hold" + " " * max_bytes + "hold"
    actual = [
        server.client.post(TEXTS, headers=A, json={"prompt": text}),
        server.client.post("/v1/embeddings", headers=A, json={"input": ["x", text]}),
        server.client.post(CHATS, headers=A, json={"messages": [{"role": "user", "content": text}]}),
        server.client.post("/v1/responses", headers=A, json={"input": text}),
        server.client.post(CHATS, headers=A, json={"messages": [
            {"role": "assistant", "content": text}, {"role": "user", "content": "x"}]}),
    ]  # fmt: skip
    for answer, param in zip(actual, ("prompt", "input", "messages", "messages", "messages"), strict=True):
        assert_error(answer, 400, param)
        assert "context" in answer.text
    assert held.begun == 0


def test_queues_are_in_the_metrics(server):
    assert server.client.post(TEXTS, headers=B, json={"prompt": "x"}).status_code == 200
    text = server.client.get("/metrics", headers=B).text
    assert 'dso:queue_jobs_total{model_name="fake-model",outcome="done",queue="tokenizing short texts"} 1.0' in text
    assert 'dso:queue_waiting{model_name="fake-model",queue="grammars"} 0.0' in text


def test_addresses_in_headers_are_ignored(live):
    """Without keys, clients are distinguished by the address of the connection, whatever the headers contain."""
    for forged in ({}, {"X-Forwarded-For": "1.2.3.4"}, {"Forwarded": "for=1.2.3.4"}, {"X-Real-IP": "1.2.3.4"}):
        assert live.client.post(TEXTS, json={"prompt": "x", "max_tokens": 1}, headers=forged).status_code == 200
        assert live.engine.seen[-1].client == "peer 127.0.0.1"


def test_bytes_of_tokens(byte_tokenizer):
    from tokenizers import normalizers, pre_tokenizers

    actual = bytes_of_token(byte_tokenizer)
    assert actual == (len("<|assistant|>"), b"")
    size = PromptSize(byte_tokenizer, 10)
    size.check(["x" * 65, "é" * 32], "prompt")
    with pytest.raises(ValueError, match="the prompt has at least 11"):
        size.check(["x" * 66, "é" * 32, "x"], "prompt")
    size._bytes = actual._replace(lost=b"\x01\xc3")
    size.check(["\x01x" * 130], "prompt")
    size.check(["é\x01" * 130], "prompt")
    PromptSize(byte_tokenizer, None).check(["x" * 10**6], "prompt")
    for change in (
        {"normalizer": normalizers.Strip()},
        {"normalizer": normalizers.Replace("ab", "c")},
        {"pre_tokenizer": pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel()])},
        {"pre_tokenizer": pre_tokenizers.Split(" ", "removed")},
    ):
        other = copy.deepcopy(byte_tokenizer)
        for name, value in change.items():
            setattr(other.backend_tokenizer, name, value)
        assert bytes_of_token(other) is None, change
    other = copy.deepcopy(byte_tokenizer)
    other.backend_tokenizer.normalizer = normalizers.NFKC()
    assert bytes_of_token(other).max_bytes == 4 * actual.max_bytes  # the normalized text may be shorter
    other = copy.deepcopy(byte_tokenizer)
    token = type(next(iter(other.added_tokens_decoder.values())))("<x>", lstrip=True)
    other.add_special_tokens({"additional_special_tokens": [token]})
    assert bytes_of_token(other) is None


KINDS = ["template", "document", pytest.param("grammar", marks=pytest.mark.slow)]  # imports torch each time


def processes(live, kind):
    state = live.app.state.server
    if kind == "template":
        return [pid for pid in [state.template._worker.pid] if pid]
    return state.grammars.pids if kind == "grammar" else state.reader.workers.pids


def ask(live, kind, n=0) -> httpx.Response:
    """Sends a request that needs a worker of this kind."""
    if kind == "document":
        return live.client.post("/v1/files", files={"file": ("a.txt", b"text")}, data={"purpose": "user_data"})
    form = {"enum": [n]} if kind == "grammar" else None
    return live.client.post(CHATS, json=body(form))


def right(answer, kind, n=0) -> bool:
    if kind == "grammar":
        return answer.json()["choices"][0]["message"]["content"] == str(n)
    return answer.status_code == 200


@pytest.mark.parametrize("kind", KINDS)
def test_a_worker_killed_during_a_request(byte_tokenizer, kind):
    """The next worker answers it; if that is killed too, the error is the server's."""
    with LiveServer(FakeEngine(byte_tokenizer)) as live, ThreadPoolExecutor(1) as pool:
        assert right(ask(live, kind), kind)
        [first] = processes(live, kind)
        os.kill(first, signal.SIGSTOP)
        answer = pool.submit(ask, live, kind, 1)
        time.sleep(0.2)
        assert not answer.done()
        os.kill(first, signal.SIGKILL)
        assert right(answer.result(), kind, 1), answer.result().text
        [second] = processes(live, kind)
        assert second != first

        os.kill(second, signal.SIGSTOP)
        answer = pool.submit(ask, live, kind, 2)
        time.sleep(0.2)
        os.kill(second, signal.SIGKILL)
        wait_for(lambda: processes(live, kind) not in ([], [second]), 30)
        os.kill(processes(live, kind)[0], signal.SIGKILL)
        assert_error(answer.result(), 503)
        assert answer.result().json()["error"]["code"] == "worker_lost" and "Retry-After" in answer.result().headers
        assert right(ask(live, kind, 3), kind, 3)
