"""Shutdown of a server: running requests finish, new ones are rejected, and no process remains. If its engine has died, all get
an error, and the process fails, so that whatever supervises it starts it again."""

from __future__ import annotations

import contextlib
import json
import re
import signal
import threading
import time
from pathlib import Path

import httpx
import pytest

from support.live_server import assert_error, wait_for
from support.warm_python import WarmPython

TESTS = Path(__file__).parents[1]
SCRIPT = """
import signal, sys
sys.path.insert(0, {tests!r})
from transformers import AutoTokenizer
from support.fake_engine import FakeEngine
from deepseek_optimizer.server.run import listener, serve
from deepseek_optimizer.server.settings import ServerSettings

tokenizer = AutoTokenizer.from_pretrained({model!r})
engine = FakeEngine(tokenizer, script=lambda request: "x" * 10_000, context=20_000, step_seconds=0.01)
signal.signal(signal.SIGUSR1, lambda *_: engine.die())
settings = ServerSettings(port=0, drain_seconds={drain})
serve(engine, settings, listener("127.0.0.1", 0), lambda host, port: print(f"port {{port}}", flush=True))
print("ended", flush=True)
"""
SEVERAL = """
import signal, sys
sys.path.insert(0, {tests!r})
from transformers import AutoTokenizer
from support.fake_engine import FakeEngine
from deepseek_optimizer.server.pool.model_list import ModelFile
from deepseek_optimizer.server.pool.model_pool import ModelPool
from deepseek_optimizer.server.pool_app import opener
from deepseek_optimizer.server.run import listener, serve_models
from deepseek_optimizer.server.settings import ServerSettings

tokenizer = AutoTokenizer.from_pretrained({model!r})
settings = ServerSettings(port=0, drain_seconds={drain})
engines = {{
    name: FakeEngine(tokenizer, script=lambda request: "x" * 10_000, context=20_000, step_seconds=0.01, model_name=name)
    for name in ("first", "second")
}}
files = {{name: ModelFile(name, name, 1, 20_000) for name in engines}}
pool = ModelPool(settings, lambda: files, opener(lambda file: (engines[file.name], settings, 1)), memory=2)
signal.signal(signal.SIGUSR1, lambda *_: engines["first"].die())
serve_models(pool, listener("127.0.0.1", 0), lambda host, port: print(f"port {{port}}", flush=True))
print("ended", flush=True)
"""


class Process:
    """A server process with a slow engine, or several: a token takes 10 ms."""

    def __init__(self, model: Path, drain: float, script: str = SCRIPT):
        self.process = WarmPython(script.format(tests=str(TESTS), model=str(model), drain=drain))
        line = self.process.stdout.readline()
        results = re.fullmatch(r"port (\d+)\n", line)
        assert results, line + self.process.stderr.read()
        self.client = httpx.Client(base_url=f"http://127.0.0.1:{results[1]}", timeout=30)

    def ask(self, tokens: int, stream: bool = False, **fields: object) -> Future:
        body = {"prompt": "x", "max_tokens": tokens, "stream": stream, **fields}
        return Future(self.client.post, "/v1/completions", json=body)

    def children(self) -> list[int]:
        """The processes that it started."""
        return [pid for pid, parent in processes() if parent == self.process.pid]


def processes() -> list[tuple[int, int]]:
    """(process, parent) of all running processes."""
    results = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:  # it ended meanwhile
            continue
        if fields[0] != "Z":
            results.append((int(stat.parent.name), int(fields[1])))
    return results


def ended(pids: list[int]) -> bool:
    return not {pid for pid, _ in processes()} & set(pids)


class Future:
    """A request in a thread."""

    def __init__(self, call, *arguments, **named):
        self.answer: httpx.Response | None = None
        self.error: Exception | None = None

        def run():
            try:
                self.answer = call(*arguments, **named)
            except httpx.HTTPError as error:
                self.error = error

        self._thread = threading.Thread(target=run)
        self._thread.start()

    def result(self) -> httpx.Response | None:
        self._thread.join(30)
        return self.answer


@pytest.fixture
def start(tiny_model):
    with contextlib.ExitStack() as running:

        def process(drain: float = 20.0, script: str = SCRIPT) -> Process:
            server = Process(tiny_model, drain, script)
            running.callback(server.client.close)
            running.enter_context(server.process)
            return server

        yield process


def test_running_requests_finish_and_new_ones_are_rejected(start):
    server = start()
    children = server.children()
    assert children  # the worker processes for templates and grammars
    whole, stream = server.ask(200), server.ask(200, stream=True)
    wait_for(lambda: "http_requests" in server.client.get("/metrics").text)
    time.sleep(0.3)  # both are running: they take two seconds
    assert server.client.get("/ready").status_code == 200
    server.process.send_signal(signal.SIGTERM)
    wait_for(lambda: server.client.get("/ready").status_code == 503)
    refused = server.client.post("/v1/completions", json={"prompt": "x"})
    assert_error(refused, 503)
    assert refused.headers["retry-after"]
    assert server.client.get("/health").status_code == 200
    assert whole.result().json()["choices"][0]["text"] == "x" * 200
    events = stream.result().text.split("\n\n")
    assert events[-2] == "data: [DONE]"
    assert "".join(json.loads(event[6:])["choices"][0]["text"] for event in events[:-2]) == "x" * 200
    out, err = server.process.communicate(timeout=20)
    assert server.process.returncode == 0 and out == "ended\n" and "Traceback" not in err, err
    wait_for(lambda: ended(children))


def test_requests_are_cancelled_after_the_drain_time(start):
    server = start(drain=0.3)
    whole, stream = server.ask(9000), server.ask(9000, stream=True)
    time.sleep(0.5)
    server.process.send_signal(signal.SIGTERM)
    assert_error(whole.result(), 503)
    assert '"error"' in stream.result().text.split("\n\n")[-3]
    _, err = server.process.communicate(timeout=20)
    assert server.process.returncode == 0 and "Traceback" not in err, err


def test_a_second_signal_ends_it_at_once(start):
    server = start()
    flight = server.ask(9000)
    time.sleep(0.3)
    children = server.children()
    assert children
    server.process.send_signal(signal.SIGTERM)
    wait_for(lambda: server.client.get("/ready").status_code == 503)
    began = time.monotonic()
    server.process.send_signal(signal.SIGTERM)
    _, err = server.process.communicate(timeout=20)
    assert server.process.returncode == 128 + signal.SIGTERM and time.monotonic() - began < 10 and "Traceback" not in err
    assert flight.result() is None and flight.error is not None
    wait_for(lambda: ended(children))


def test_it_ends_with_an_error_if_its_engine_dies(start):
    server = start()
    children = server.children()
    whole, stream = server.ask(9000), server.ask(9000, stream=True)
    time.sleep(0.5)
    server.process.send_signal(signal.SIGUSR1)
    assert_error(whole.result(), 503)
    assert '"error"' in stream.result().text.split("\n\n")[-3]
    out, err = server.process.communicate(timeout=20)
    assert server.process.returncode == 1 and "ended" not in out, err
    assert "the server has ended, since its engine stopped" in err and "a second signal" not in err
    wait_for(lambda: ended(children))


@pytest.mark.parametrize("asked", [True, False], ids=["during a request", "idle"])
def test_with_several_models_it_ends_with_an_error_if_the_engine_of_one_dies(start, asked):
    server = start(script=SEVERAL)
    for name in ("first", "second"):
        assert server.ask(1, model=name).result().status_code == 200
    other = server.ask(300, model="second")
    if asked:
        whole, stream = server.ask(9000, model="first"), server.ask(9000, stream=True, model="first")
    time.sleep(0.5)
    server.process.send_signal(signal.SIGUSR1)
    if asked:
        assert_error(whole.result(), 503)
        assert '"error"' in stream.result().text.split("\n\n")[-3]
    assert other.result().json()["choices"][0]["text"] == "x" * 300  # requests to the other model finish
    out, err = server.process.communicate(timeout=20)
    assert server.process.returncode == 1 and "ended" not in out, err
    assert "the server has ended, since the engine of first stopped" in err and "a second signal" not in err


def test_an_engine_that_dies_while_the_server_stops_changes_nothing(start):
    server = start()
    flight = server.ask(9000)
    time.sleep(0.3)
    server.process.send_signal(signal.SIGTERM)
    wait_for(lambda: server.client.get("/ready").status_code == 503)
    server.process.send_signal(signal.SIGUSR1)
    assert_error(flight.result(), 503)
    _, err = server.process.communicate(timeout=20)
    assert server.process.returncode == 0 and "Traceback" not in err, err


def test_a_client_that_does_not_read_does_not_prevent_shutdown(start):
    import socket

    server = start(drain=1.0)
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.connect(("127.0.0.1", server.client.base_url.port))
        body = json.dumps({"prompt": "x", "stream": True, "max_tokens": 9000}).encode()
        head = (
            b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
        )
        sock.sendall(head % len(body) + body)
        time.sleep(0.5)
        server.process.send_signal(signal.SIGTERM)
        server.process.communicate(timeout=20)
    assert server.process.returncode == 0
