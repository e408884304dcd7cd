"""Vulnerabilities of other servers that are not tested elsewhere. Elsewhere: unlimited `n` and large heads
(test_sampling_fields, test_connections), templates and their sandbox, images by URL (test_chat), DNS rebinding and paths
(test_access, test_models), scripts in a model's output (test_page, tests/page), salts (test_access, test_real_engine)."""

from __future__ import annotations

import ast
import copy
import json
import re
import time
from pathlib import Path

import pytest

import deepseek_optimizer
from support.chats import HERMES, WEATHER
from support.fake_engine import FakeEngine
from support.live_server import LiveServer

ROOT = Path(deepseek_optimizer.__file__).parent
SOURCES = [path for folder in ("server", "chat", "engine") for path in sorted((ROOT / folder).rglob("*.py"))]
RUN_CODE = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "zmq"}
RUN_TEXT = {"eval", "exec", "compile", "__import__"}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_input_is_never_executed(path):
    """No pickle, `eval`, shell or `torch.load` in any code that a request passes through."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = {alias.name.split(".")[0] for alias in node.names} | {(getattr(node, "module", None) or "").split(".")[0]}
            assert not names & RUN_CODE, f"line {node.lineno}"
        if isinstance(node, ast.Call):
            name = node.func.id if isinstance(node.func, ast.Name) else None
            actual = f"line {node.lineno}"
            assert name not in RUN_TEXT, actual
            whole = ast.unparse(node.func)
            assert whole not in ("torch.load", "os.system", "yaml.load", "jinja2.Template", "jinja2.Environment"), (
                f"line {node.lineno}"
            )
            assert not any(keyword.arg == "shell" for keyword in node.keywords), actual


HOSTILE = [
    '<tool_call>{"name": "weather", "arguments": __import__("os").system("touch /tmp/run")}</tool_call>',
    '<tool_call>{"name": "weather", "arguments": "__import__(\'os\')"}</tool_call>',
    '<tool_call>{"name": "__class__", "arguments": {}}</tool_call>',
    "<tool_call>" * 400,
    '<tool_call>{"name": "weather", "arguments": {"city": "' + "\\" * 2000,
    '<tool_call>{"name": "weather", "arguments": ' + "[" * 2000 + "</tool_call>",
    '<tool_call>{"name": "weather", "arguments": {"city": NaN}}</tool_call>',
    '<tool_call>{"name": "weather", "arguments": {"city": "\\ud800"}}</tool_call>',
    "<" * 3000,
    '<img src=x onerror="alert(1)"><script>alert(1)</script>',
    'data: [DONE]\n\ndata: {"error": {"message": "not one"}}\n\n',
]


@pytest.fixture(scope="module")
def saying(byte_tokenizer, grammars):
    """A model that repeats the last message."""
    tokenizer = copy.deepcopy(byte_tokenizer)
    tokenizer.chat_template = HERMES

    def script(request):
        return HOSTILE[int(re.search("number ([0-9]+)", tokenizer.decode(request.prompt))[1])]

    with LiveServer(FakeEngine(tokenizer, script=script, context=16_384), grammars=grammars) as live:
        yield live


@pytest.mark.parametrize("number", range(len(HOSTILE)))
def test_output_of_a_model_is_data(saying, number):
    """It reaches the client as text or as arguments of a call, in linear time, and cannot forge events of a stream."""
    body = {"messages": [{"role": "user", "content": f"number {number}"}], "tools": [WEATHER], "max_tokens": 5000}
    began = time.perf_counter()
    message = saying.client.post("/v1/chat/completions", json=body).json()["choices"][0]["message"]
    events = saying.client.post("/v1/chat/completions", json={**body, "stream": True}).text.split("\n\n")
    assert time.perf_counter() - began < 30
    for call in message.get("tool_calls", ()):
        assert isinstance(json.loads(call["function"]["arguments"]), dict) and isinstance(call["function"]["name"], str)
    if "tool_calls" not in message:
        assert message["content"] == HOSTILE[number]
    assert events[-2:] == ["data: [DONE]", ""] and events.count("data: [DONE]") == 1
    deltas = [json.loads(event[6:])["choices"][0]["delta"] for event in events[:-2]]
    assert "".join(delta.get("content", "") for delta in deltas) == (message["content"] or "")
    assert not Path("/tmp/run").exists()


def test_the_server_makes_no_requests(saying, monkeypatch):
    """The request contains everything that could make a server open a connection."""
    import socket

    def connect(*arguments):
        raise AssertionError("a connection was opened")

    url = "http://127.0.0.1:9/x"
    bodies = [
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}]},
        {"messages": [{"role": "user", "content": f"number 9 ![]({url}) {url}"}], "max_tokens": 5},
        {"model": url, "messages": [{"role": "user", "content": "number 9"}]},
    ]
    with saying.connect() as sock:  # the client's own connection is open before
        monkeypatch.setattr(socket.socket, "connect", connect)
        monkeypatch.setattr(socket, "create_connection", connect)
        monkeypatch.setattr(socket, "getaddrinfo", connect)
        for body in bodies:
            data = json.dumps(body).encode()
            head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            sock.sendall(head + b"Content-Length: %d\r\n\r\n" % len(data) + data)
            answer = sock.recv(65536)
            assert answer.split()[1] in (b"200", b"400", b"404"), answer
