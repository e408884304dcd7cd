"""One replica on Ray Serve, which HAProxy hands the requests to."""

from __future__ import annotations

import json
import signal
import time

import httpx
import pytest

from support.saved_llama import saved_llama

from .test_ray import Cluster


@pytest.fixture(scope="module")
def cluster(byte_tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ray")
    cluster = Cluster(saved_llama(folder / "model", byte_tokenizer), folder / "log", "--replica-cpus", "0.5")
    try:
        cluster.wait()
        yield cluster
        cluster.process.send_signal(signal.SIGTERM)
        begin = time.monotonic()
        assert cluster.process.wait(60) == 0 and time.monotonic() - begin < 25  # Ray would let replicas wait for 30 seconds
    finally:
        cluster.kill()


def test_answers_and_streams(cluster: Cluster) -> None:
    assert "requests  by HAProxy" in cluster.log.read_text()
    whole = cluster.complete("count", 20)
    assert whole.status_code == 200, whole.text
    assert len(whole.headers.get_list("x-request-id")) == 1
    assert whole.headers["x-replica-id"] == cluster.complete("other").headers["x-replica-id"]
    body = {"prompt": "count", "max_tokens": 20, "temperature": 0, "ignore_eos": True, "stream": True}
    with httpx.stream("POST", f"{cluster.url}/v1/completions", json=body, timeout=60) as response:
        assert response.status_code == 200
        events = [line.removeprefix("data: ") for line in response.iter_lines() if line]
    assert events.pop() == "[DONE]" and len(events) > 1
    texts = [choice["text"] for event in events for choice in json.loads(event)["choices"]]
    assert "".join(texts) == whole.json()["choices"][0]["text"]
    assert httpx.get(f"{cluster.url}/health").status_code == 200


def test_requests_wait_for_the_next_replica(cluster: Cluster) -> None:
    before = cluster.complete("count", 20)
    [replica] = cluster.replicas()
    replica.kill()
    replica.wait(10)
    after = cluster.complete("count", 20)
    assert after.status_code == 200 and after.json()["choices"] == before.json()["choices"]
    assert after.headers["x-replica-id"] != before.headers["x-replica-id"]
    assert len(after.headers.get_list("x-request-id")) == 1, "through the proxy behind HAProxy"
