"""`quality` and `min_quality` of requests, and what answers and metrics say about them."""

from __future__ import annotations

import json

import pytest

from deepseek_optimizer.backends.cpu import unavailable_reason
from support.live_server import LiveServer, wait_for

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"


@pytest.fixture(scope="module")
def served(tiny_model):
    if unavailable_reason() is not None:
        pytest.skip(str(unavailable_reason()))
    from transformers import AutoTokenizer

    from deepseek_optimizer import load_model
    from deepseek_optimizer.serving import make_async_engine

    model = load_model(tiny_model, precision="int8_nested", kv_cache_memory=1 << 24)
    with LiveServer(make_async_engine(model, AutoTokenizer.from_pretrained(tiny_model), model_name="tiny")) as live:
        yield live
        wait_for(lambda: live.engine.admitted == 0)


def test_answers_say_at_which_quality_they_were_computed(served):
    body = {"prompt": "Hello", "max_tokens": 4, "temperature": 0}
    for fields, quality in (({}, "exact"), ({"quality": "fast"}, "fast"), ({"min_quality": "balanced"}, "exact")):
        answer = served.client.post(TEXT, json={**body, **fields}).json()
        assert answer["usage"]["quality"] == quality
        chat = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4, **fields}
        assert served.client.post(CHAT, json=chat).json()["usage"]["quality"] == quality


def test_streams_say_it_in_their_usage(served):
    body = {
        "prompt": "Hello",
        "max_tokens": 3,
        "quality": "balanced",
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    lines = [line.removeprefix("data: ") for line in served.client.post(TEXT, json=body).text.splitlines() if line]
    assert lines[-1] == "[DONE]" and json.loads(lines[-2])["usage"]["quality"] == "balanced"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("protocol", ["responses", "messages", "ollama chat", "ollama generate", "tgi", "llama.cpp"])
def test_other_protocols(served, protocol, stream):
    chat, wanted = [{"role": "user", "content": "Hello"}], {"quality": "fast"}
    path, body, where = {
        "responses": ("/v1/responses", {"input": "Hello", "max_output_tokens": 16, **wanted}, "usage.quality"),
        "messages": ("/v1/messages", {"messages": chat, "max_tokens": 3, **wanted}, "usage.quality"),
        "ollama chat": ("/api/chat", {"messages": chat, "options": {"num_predict": 3, **wanted}}, "quality"),
        "ollama generate": ("/api/generate", {"prompt": "Hello", "options": {"num_predict": 3, **wanted}}, "quality"),
        "tgi": ("/generate", {"inputs": "Hello", "parameters": {"details": True, **wanted}}, "details.quality"),
        "llama.cpp": ("/completion", {"prompt": "Hello", "n_predict": 3, **wanted}, "quality"),
    }[protocol]
    if protocol == "tgi" and stream:
        path = "/generate_stream"
    elif protocol != "tgi":
        body["stream"] = stream
    answer = served.client.post(path, json=body)
    assert answer.status_code == 200, answer.text
    lines = [line.removeprefix("data:") for line in answer.text.splitlines() if line and not line.startswith("event:")]
    objects = [json.loads(line) for line in lines if line.strip() != "[DONE]"]
    if protocol == "responses":
        objects = [one.get("response", one) for one in objects]
    assert {value for one in objects if (value := _at(one, where.split("."))) is not None} == {"fast"}


def _at(value, path):
    for name in path:
        value = value.get(name) if isinstance(value, dict) else None
    return value


def test_a_busy_engine_lowers_what_allows_it_and_says_so(served):
    """Started requests have exact weights; once the engine is busy, the next one that allows it has not."""
    lowering = served.engine.core.lowering
    body = {"prompt": "Hello", "max_tokens": 3}
    served.call(lambda: setattr(lowering, "active", True))
    lowered = served.client.post(TEXT, json={**body, "min_quality": "fast"}).json()
    served.call(lambda: setattr(lowering, "active", True))
    kept = served.client.post(TEXT, json=body).json()
    assert lowered["usage"]["quality"] == "fast" and kept["usage"]["quality"] == "exact"


def test_metrics(served):
    served.client.post(TEXT, json={"prompt": "Hello", "max_tokens": 2, "quality": "fast"})
    text = served.client.get("/metrics").text
    assert 'dso:requests_by_quality_total{model_name="tiny",quality="fast"}' in text
    assert 'dso:requests_lowered_total{model_name="tiny"}' in text and 'dso:quality_lowered{model_name="tiny"}' in text


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"quality": "best"}, "quality"),
        ({"min_quality": 3}, "min_quality"),
        ({"quality": "fast", "min_quality": "exact"}, "min_quality"),
    ],
)
def test_wrong_values_are_refused(served, fields, param):
    answer = served.client.post(TEXT, json={"prompt": "Hello", "max_tokens": 2, **fields})
    assert answer.status_code == 400 and answer.json()["error"]["param"] == param


def test_a_model_with_one_precision_names_the_remedy(tiny_server):
    answer = tiny_server.client.post(TEXT, json={"prompt": "Hello", "max_tokens": 2, "quality": "fast"})
    assert answer.status_code == 400 and answer.json()["error"]["param"] == "quality"
    assert "--precision int8_nested" in answer.json()["error"]["message"]
    plain = tiny_server.client.post(TEXT, json={"prompt": "Hello", "max_tokens": 2}).json()
    assert "quality" not in plain["usage"]
