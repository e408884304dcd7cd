"""/slots, llama-server's metrics, and servers that are started without them or without the chat page."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from deepseek_optimizer import ConfigError
from deepseek_optimizer.engine.metrics import EngineMetrics
from deepseek_optimizer.server.http.llama_metrics import LlamaMetrics
from deepseek_optimizer.server.keys import ApiKeys
from deepseek_optimizer.server.settings import ServerSettings
from support.live_server import assert_error, wait_for


def values(text: str) -> dict[str, float]:
    return {line.split()[0]: float(line.split()[1]) for line in text.splitlines() if line.startswith("llamacpp:")}


def test_slots_show_running_requests_and_no_texts(make_server):
    live = make_server(ServerSettings(keys=ApiKeys(["key"])), capacity=3)
    headers = {"Authorization": "Bearer key"}
    assert_error(live.client.get("/slots"), 401)
    idle = live.client.get("/slots", headers=headers).json()
    assert [slot["id"] for slot in idle] == [0, 1, 2] and not any(slot["is_processing"] for slot in idle)
    assert idle[0]["next_token"] == [{"has_next_token": False, "n_remain": -1, "n_decoded": 0}]
    live.engine.frozen = True
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(live.client.post, "/completion", json={"prompt": "secret", "n_predict": 5}, headers=headers)
        wait_for(lambda: live.engine.running == 1)
        busy = live.client.get("/slots", headers=headers)
        live.engine.frozen = False
        assert asked.result().status_code == 200
    assert [slot["is_processing"] for slot in busy.json()] == [True, False, False] and "secret" not in busy.text
    assert busy.json()[0]["n_prompt_tokens"] == 6 and busy.json()[0]["next_token"][0]["n_remain"] == 5
    assert busy.json()[0]["n_ctx"] == live.engine.context


def test_a_server_without_slots_metrics_and_page(make_server):
    live = make_server(ServerSettings(slots=False, metrics=False, page=False))
    for path in ("/slots", "/metrics"):
        assert_error(live.client.get(path), 501)
    assert live.client.get("/").status_code == 404
    assert live.client.post("/completion", json={"prompt": "x", "n_predict": 1}).status_code == 200


def test_metrics_have_both_names(client):
    response = client.get("/metrics")
    assert "Process-Start-Time-Unix" in response.headers and "http_requests_total" in response.text
    names = values(response.text)
    assert len(names) == 15 and names["llamacpp:requests_processing"] == 0
    for name in names:
        assert f"# HELP {name} " in response.text and f"# TYPE {name} " in response.text


def test_throughput_since_the_last_scrape():
    metrics = EngineMetrics()
    engine = type("Engine", (), {"metrics": metrics, "load": (1, 2), "drafted": (6, 3, 2)})
    llama = LlamaMetrics(engine)
    metrics.prompt_tokens, metrics.prompt_seconds, metrics.generated_tokens = 100, 4.0, 11
    metrics.between.add(0.5, 10)
    metrics.step(3, 3, 0, 0.1, 0)
    first, second = values(llama.text().decode()), values(llama.text().decode())
    assert first["llamacpp:prompt_tokens_seconds"] == 25 and first["llamacpp:predicted_tokens_seconds"] == 2
    assert second["llamacpp:prompt_tokens_seconds"] == second["llamacpp:predicted_tokens_seconds"] == 0
    assert second["llamacpp:tokens_predicted_total"] == 11 and second["llamacpp:tokens_predicted_seconds_total"] == 5
    assert (second["llamacpp:requests_processing"], second["llamacpp:requests_deferred"]) == (1, 2)
    assert second["llamacpp:n_busy_slots_per_decode"] == 3 and second["llamacpp:spec_decode_num_drafts_total"] == 2


def test_the_metrics_of_an_engine_count_requests(tiny_server):
    before = values(tiny_server.client.get("/metrics").text)
    answer = tiny_server.client.post("/completion", json={"prompt": "hello there", "n_predict": 5, "ignore_eos": True}).json()
    after = values(tiny_server.client.get("/metrics").text)
    grown = {name.removeprefix("llamacpp:"): after[name] - before[name] for name in after}
    assert grown["tokens_predicted_total"] == 5 and grown["prompt_tokens_total"] == answer["timings"]["prompt_n"]
    assert grown["n_decode_total"] >= 1 and after["llamacpp:n_tokens_max"] >= answer["tokens_cached"]
    assert after["llamacpp:prompt_seconds_total"] > 0 and after["llamacpp:tokens_predicted_seconds_total"] > 0


@pytest.mark.parametrize("seconds", [0, -1, float("inf"), float("nan")])
def test_invalid_times_of_sleep(seconds):
    with pytest.raises(ConfigError, match="idle_sleep"):
        ServerSettings(idle_sleep=seconds)
