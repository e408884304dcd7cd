"""Fields that a request omits: sampling parameters, and the maximum length of an answer; shown in /props and /v1/models."""

from __future__ import annotations

import copy

import pytest

from deepseek_optimizer.server.settings import ServerSettings
from support.chats import THINKING
from support.fake_engine import FakeEngine
from support.live_server import LiveServer

CHAT = {"messages": [{"role": "user", "content": "hi"}]}


@pytest.fixture(scope="module")
def thinker(byte_tokenizer):
    """A server whose model can think, with other defaults for answers without thinking."""
    tokenizer = copy.deepcopy(byte_tokenizer)
    tokenizer.chat_template = THINKING
    settings = ServerSettings(
        sampling={"temperature": 0.6, "top_k": 20},
        sampling_not_thinking={"temperature": 0.7, "top_k": 20},
        max_answer_tokens=30,
        model_path="models/thinker",
    )
    with LiveServer(FakeEngine(tokenizer, script=lambda request: "x" * 100), settings) as live:
        yield live


def test_defaults_depend_on_thinking(thinker):
    used = []
    for path, body in (
        ("/v1/chat/completions", CHAT),
        ("/v1/chat/completions", {**CHAT, "chat_template_kwargs": {"enable_thinking": False}}),
        ("/v1/chat/completions", {**CHAT, "reasoning_effort": "none", "temperature": 0.1}),
        ("/v1/responses", {"input": "hi"}),
        ("/v1/responses", {"input": "hi", "reasoning": {"effort": "none"}}),
        ("/v1/completions", {"prompt": "hi"}),
    ):
        assert thinker.client.post(path, json=body).status_code == 200
        used.append((thinker.engine.seen[-1].sampling.temperature, thinker.engine.seen[-1].sampling.top_k))
    assert used == [(0.6, 20), (0.7, 20), (0.1, 20), (0.6, 20), (0.7, 20), (0.6, 20)]


def test_an_answer_without_a_limit_is_cut(thinker):
    for fields in ({}, {"max_tokens": None}, {"max_tokens": -1}, {"max_completion_tokens": -1}, {"n_predict": -1}):
        choice = thinker.client.post("/v1/chat/completions", json={**CHAT, **fields}).json()["choices"][0]
        assert choice["finish_reason"] == "length" and thinker.engine.seen[-1].sampling.max_tokens == 30
    body = thinker.client.post("/v1/responses", json={"input": "hi"}).json()
    assert body["status"] == "incomplete" and body["max_output_tokens"] is None
    choice = thinker.client.post("/v1/chat/completions", json={**CHAT, "max_tokens": 200}).json()["choices"][0]
    assert choice["finish_reason"] == "stop"
    thinker.client.post("/v1/chat/completions", json={**CHAT, "min_tokens": 40})
    assert thinker.engine.seen[-1].sampling.max_tokens == 40
    thinker.client.post("/v1/completions", json={"prompt": "hi"})
    assert thinker.engine.seen[-1].sampling.max_tokens == 16  # OpenAI's default


def test_props(thinker):
    actual = thinker.client.get("/props").json()
    settings = actual["default_generation_settings"]
    assert settings["n_ctx"] == 4096
    shown = {name: settings["params"][name] for name in ("temperature", "top_k", "top_p", "max_tokens", "n_predict")}
    assert shown == {"temperature": 0.6, "top_k": 20, "top_p": 1.0, "max_tokens": 30, "n_predict": 30}
    assert actual["sampling_without_thinking"] == {"temperature": 0.7, "top_k": 20}
    assert (actual["model_alias"], actual["model_path"]) == ("fake-model", "models/thinker")
    assert actual["chat_template"] == THINKING and actual["total_slots"] == 64 and actual["eos_token"]
    assert actual["modalities"] == {"vision": False, "audio": False} and actual["is_sleeping"] is False


def test_the_model_card_has_the_maximum(thinker):
    (card,) = thinker.client.get("/v1/models").json()["data"]
    assert card["default_sampling"]["temperature"] == 0.6 and card["default_sampling"]["max_tokens"] == 30


def test_the_maximum_is_at_most_the_context(make_server):
    live = make_server(context=512)
    (card,) = live.client.get("/v1/models").json()["data"]
    assert card["default_sampling"]["max_tokens"] == 512


def test_negative_values_that_mean_none(live):
    body = {"prompt": "hi", "max_tokens": 4, "seed": -1, "priority": -1, "top_k": -1}
    assert live.client.post("/v1/completions", json=body).status_code == 200
    request = live.engine.seen[-1]
    assert (request.sampling.seed, request.priority, request.sampling.top_k) == (None, 0, 0)


def test_llama_servers_name_of_the_maximum(live):
    assert live.client.post("/v1/completions", json={"prompt": "hi", "n_predict": 5}).status_code == 200
    assert live.engine.seen[-1].sampling.max_tokens == 5


@pytest.mark.parametrize(
    "path, body", [("/chat/completions", CHAT), ("/completions", {"prompt": "x"}), ("/responses", {"input": "x"})]
)
def test_paths_without_v1(client, path, body):
    limit = "max_output_tokens" if path == "/responses" else "max_tokens"
    assert client.post(path, json={**body, limit: 1}).status_code == 200


def test_further_paths_without_v1(client):
    assert client.post("/embeddings", json={"input": "x"}).status_code == 200
    assert client.get("/models").json() == client.get("/v1/models").json()
    assert client.get("/models/fake-model").json() == client.get("/v1/models/fake-model").json()
    assert client.get("/files").status_code == 200
    paths = client.get("/openapi.json").json()["paths"]
    assert "/v1/models" in paths and "/models" not in paths


@pytest.mark.parametrize(
    "path, body, expected",
    [
        ("/v1/chat/completions", CHAT, [0, 1, 2, 3, 3]),  # with the role, for each token, and without an answer
        ("/v1/completions", {"prompt": "hi"}, [1, 2, 3, 3]),
    ],
)
def test_usage_in_every_chunk(client, path, body, expected):
    import json

    options = {"include_usage": True, "continuous_usage_stats": True}
    text = client.post(path, json={**body, "max_tokens": 3, "stream": True, "stream_options": options}).text
    chunks = [json.loads(event[6:]) for event in text.split("\n\n")[:-2]]
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts == expected
    assert chunks[-1]["choices"] == [] and chunks[-2]["choices"][0]["finish_reason"] == "length"
    plain = {"include_usage": False, "continuous_usage_stats": True}
    text = client.post(path, json={**body, "max_tokens": 3, "stream": True, "stream_options": plain}).text
    assert '"usage"' not in text


def test_null_content_of_a_tool_message(client):
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    messages = [
        *CHAT["messages"],
        {"role": "assistant", "content": None, "tool_calls": [call], "reasoning": None},
        {"role": "tool", "tool_call_id": "1", "content": None},
    ]
    assert client.post("/v1/chat/completions", json={"messages": messages, "max_tokens": 1}).status_code == 200


def test_fields_without_effect_are_not_named(client):
    fields = {
        "verbosity": "low",
        "prediction": {"type": "content", "content": "x"},
        "web_search_options": {},
        "cache_prompt": True,
        "user": "me",
    }
    actual = client.post("/v1/chat/completions", json={**CHAT, "max_tokens": 1, **fields})
    assert actual.status_code == 200 and "x-ignored-fields" not in actual.headers
