"""A server that sleeps after a time without requests, until the next one."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from deepseek_optimizer.server.settings import ServerSettings
from support.live_server import wait_for


def asleep(live) -> bool:
    return live.client.get("/props").json()["is_sleeping"]


@pytest.mark.parametrize(
    ("path", "body"),
    [("/completion", {"prompt": "x", "n_predict": 2}), ("/tokenize", {"content": "x"}), ("/v1/embeddings", {"input": "x"})],
)
def test_the_next_request_wakes_it(make_server, path, body):
    live = make_server(ServerSettings(idle_sleep=0.2))
    assert not asleep(live)
    wait_for(lambda: asleep(live))
    for other in ("/health", "/ready", "/v1/models", "/metrics", "/slots"):
        assert live.client.get(other).status_code == 200
    assert asleep(live)
    assert live.client.post(path, json=body).status_code == 200
    wait_for(lambda: asleep(live))  # again


def test_it_does_not_sleep_during_a_request(make_server):
    live = make_server(ServerSettings(idle_sleep=0.1), step_seconds=0.02)
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(live.client.post, "/completion", json={"prompt": "x", "n_predict": 30, "ignore_eos": True})
        wait_for(lambda: live.engine.running == 1)
        while not asked.done():
            assert not asleep(live) or asked.done()
        assert asked.result().status_code == 200


def test_a_sleep_that_a_client_began_is_not_ended_by_requests(make_server):
    live = make_server(ServerSettings(idle_sleep=60, sleep_mode=True))
    live.client.post("/sleep")
    assert asleep(live) and live.client.get("/ready").status_code == 503
    assert live.client.post("/completion", json={"prompt": "x"}).status_code == 503
    live.client.post("/wake_up")
    assert live.client.post("/completion", json={"prompt": "x", "n_predict": 1}).status_code == 200
