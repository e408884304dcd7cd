"""Replicas on Ray Serve: prefixes and sessions stay at a replica, and no answer is lost that had not begun when one died."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import psutil
import pytest

from support.saved_llama import saved_llama

_START, _REPLICA = 300, "ray::ServeReplica"  # seconds; the beginning of a replica's process name


class Cluster:
    """`dso serve --ray` in a process of its own."""

    def __init__(self, model: Path, log: Path, *options: str) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        self.url, self.log = f"http://127.0.0.1:{port}", log
        command = [Path(sys.executable).with_name("dso"), "serve", model, "--ray", "--port", port, "--kv-cache-memory", 1 << 26]
        environment = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0", "PYTHONPATH": os.pathsep.join(sys.path)}
        with log.open("w") as stderr:
            self.process = subprocess.Popen([*map(str, command), *options], stderr=stderr, stdout=stderr, env=environment)

    def wait(self) -> None:
        end = time.monotonic() + _START
        while "address   " not in self.log.read_text():
            assert self.process.poll() is None and time.monotonic() < end, self.log.read_text()[-3000:]
            time.sleep(0.2)

    def complete(self, prompt: str, tokens: int = 4, session: str | None = None) -> httpx.Response:
        body = {"prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True}
        headers = {} if session is None else {"X-Session-Id": session}
        return httpx.post(f"{self.url}/v1/completions", json=body, headers=headers, timeout=120)

    def kill(self) -> None:
        """Ends what is left of it."""
        for child in [*psutil.Process(self.process.pid).children(recursive=True)] if self.process.poll() is None else []:
            child.kill()
        self.process.kill()

    def replicas(self) -> list[psutil.Process]:
        found = []
        for process in psutil.Process(self.process.pid).children(recursive=True):
            try:
                if any(part.startswith(_REPLICA) for part in process.cmdline()):
                    found.append(process)
            except psutil.Error:  # it has just ended
                continue
        return found


@pytest.fixture(scope="module")
def cluster(byte_tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ray")
    model = saved_llama(folder / "model", byte_tokenizer, max_position_embeddings=8192)
    cluster = Cluster(model, folder / "log", "--replicas", "2", "--replica-cpus", "0.5")
    try:
        cluster.wait()
        yield cluster
        cluster.process.send_signal(signal.SIGTERM)
        assert cluster.process.wait(60) == 0
    finally:
        cluster.kill()


def replica_of(response: httpx.Response) -> str:
    assert response.status_code == 200, response.text
    return response.headers["x-replica-id"]


def test_continued_texts_and_sessions_stay_at_a_replica(cluster: Cluster) -> None:
    texts = [f"{number} " * 200 for number in range(6)]
    first = [cluster.complete(text) for text in texts]
    assert len({replica_of(response) for response in first}) == 2
    for text, response in zip(texts, first, strict=True):
        again = cluster.complete(text + " and more")
        assert replica_of(again) == replica_of(response)
        assert again.json()["usage"]["prompt_tokens_details"]["cached_tokens"] >= 320
    assert len({replica_of(cluster.complete(f"other {i}", session="mine")) for i in range(5)}) == 1


def test_both_replicas_work_at_once(cluster: Cluster) -> None:
    with ThreadPoolExecutor(16) as pool:
        made = list(pool.map(lambda i: cluster.complete("the same " * 60, 30 + i), range(16)))
    used = [replica_of(response) for response in made]
    assert min(used.count(name) for name in set(used)) >= 4 and len(set(used)) == 2


def test_a_replica_that_dies_costs_no_answer_that_had_not_begun(cluster: Cluster) -> None:
    expected = cluster.complete("count", 300).json()["choices"][0]["text"]
    [victim, _] = cluster.replicas()
    with ThreadPoolExecutor(8) as pool:
        answers = [pool.submit(cluster.complete, "count", 300) for _ in range(8)]
        time.sleep(0.2)
        victim.kill()
        for answer in answers:
            assert answer.result().json()["choices"][0]["text"] == expected
    end = time.monotonic() + _START
    while len(cluster.replicas()) < 2:
        assert time.monotonic() < end
        time.sleep(0.5)


def test_replicas_are_replaced_while_requests_go_on(cluster: Cluster) -> None:
    expected = cluster.complete("count", 100).json()["choices"][0]["text"]
    old, texts, stop = {process.pid for process in cluster.replicas()}, [], threading.Event()

    def ask() -> None:
        while not stop.is_set():
            texts.append(cluster.complete("count", 100).json()["choices"][0]["text"])

    with ThreadPoolExecutor(4) as pool:
        asking = [pool.submit(ask) for _ in range(4)]
        try:
            cluster.process.send_signal(signal.SIGUSR1)
            end = time.monotonic() + _START
            while "the replicas were replaced" not in cluster.log.read_text():
                assert time.monotonic() < end, cluster.log.read_text()[-3000:]
                time.sleep(0.2)
        finally:
            stop.set()
        for one in asking:
            one.result()
    assert set(texts) == {expected} and len(texts) > 10
    assert not old & {process.pid for process in cluster.replicas()}


def test_a_stream_whose_replica_dies_ends_with_an_error(cluster: Cluster) -> None:
    body = {"prompt": "stream", "max_tokens": 8000, "ignore_eos": True, "stream": True}
    events, replicas = [], cluster.replicas()
    with httpx.stream("POST", f"{cluster.url}/v1/completions", json=body, timeout=120) as response:
        for line in response.iter_lines():
            if line.startswith("data: "):
                events.append(line.removeprefix("data: "))
            if len(events) == 1:
                while replicas:
                    replicas.pop().kill()
    assert json.loads(events[-1])["error"]["code"] == "replica_lost"
