"""/v1/models, names of models, /tokenize, /detokenize, /metrics."""

from __future__ import annotations

import builtins
import os

import pytest

from deepseek_optimizer.server.settings import ServerSettings
from support.live_server import assert_error

HOSTILE = [
    "../fake-model",
    "../../etc/passwd",
    "/etc/passwd",
    "fake-model/../fake-model",
    "http://evil.example/m",
    "file:///etc/passwd",
    "fake-model\x00",
    "\x00",
    "C:\\model",
    "~",
    "fake-model ",
    "FAKE-MODEL",
    "%2e%2e/fake-model",
    "a" * 1000,
]


def test_list_and_single_model(client):
    actual = client.get("/v1/models").json()
    assert actual["object"] == "list" and [card["id"] for card in actual["data"]] == ["fake-model"]
    assert client.get("/v1/models/fake-model").json() == actual["data"][0]
    assert actual["data"][0]["max_model_len"] == 4096
    plain = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}
    assert actual["data"][0]["default_sampling"] == {**plain, "presence_penalty": 0.0, "max_tokens": 4096}


def test_the_model_card_has_the_recommended_sampling(make_server):
    live = make_server(ServerSettings(sampling={"temperature": 0.6, "top_p": 0.95}))
    (card,) = live.client.get("/v1/models").json()["data"]
    assert card["default_sampling"] | {"temperature": 0.6, "top_p": 0.95} == card["default_sampling"]


def test_a_name_with_slashes(make_server):
    live = make_server(model_name="deepseek-ai/v3")
    assert live.client.get("/v1/models/deepseek-ai/v3").json()["id"] == "deepseek-ai/v3"
    requested = {"model": "deepseek-ai/v3", "prompt": "x", "max_tokens": 1}
    assert live.client.post("/v1/completions", json=requested).status_code == 200


@pytest.mark.parametrize(
    "path,rest",
    [
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}]}),
        ("/v1/completions", {"prompt": "x"}),
        ("/v1/responses", {"input": "x"}),
        ("/v1/embeddings", {"input": "x"}),
        ("/tokenize", {"prompt": "x"}),
        ("/detokenize", {"tokens": [1]}),
    ],
)
def test_other_models_are_a_404_without_file_access(live, refused, path, rest, monkeypatch):
    touched = []

    def watch(real):
        def opened(file, *arguments, **named):
            if any(str(file) == name for name in HOSTILE):
                touched.append(file)
            return real(file, *arguments, **named)

        return opened

    for module, name in ((builtins, "open"), (os, "open"), (os, "stat"), (os, "listdir")):
        monkeypatch.setattr(module, name, watch(getattr(module, name)))
    for name in HOSTILE:
        refused(path, {"model": name, **rest}, 404, "model")
    assert not touched


@pytest.mark.parametrize("name", [None, "", "dummy"])
def test_requests_without_a_name(client, name):
    actual = client.post("/v1/completions", json={"model": name, "prompt": "x", "max_tokens": 1})
    assert actual.status_code == 200 and actual.json()["model"] == "fake-model"


@pytest.mark.parametrize("name", [1, ["fake-model"], {}, True, "a" * 5000])
def test_invalid_names(refused, name):
    refused("/v1/completions", {"model": name, "prompt": "x"}, 400, "model")


@pytest.mark.parametrize(
    "name", [name for name in HOSTILE if "\x00" not in name] + ["%00", "%2e%2e%2f%2e%2e%2fetc%2fpasswd", "a" * 20_000]
)
def test_other_models_in_the_url(live, name):
    name = name.replace(" ", "%20").encode()  # unchanged: httpx would resolve the dots
    answer = live.raw(b"GET /v1/models/" + name + b" HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
    assert answer.split()[1] == b"404" and b'"error"' in answer


def test_tokens_of_a_text_and_back(client, byte_tokenizer):
    text = "naïve 😀 <|user|>"
    actual = client.post("/tokenize", json={"prompt": text, "return_token_strs": True}).json()
    assert actual["tokens"] == byte_tokenizer(text)["input_ids"] and actual["count"] == len(actual["tokens"])
    assert actual["max_model_len"] == 4096
    assert actual["token_strs"] == byte_tokenizer.convert_ids_to_tokens(actual["tokens"])
    assert client.post("/tokenize", json={"prompt": text}).json()["token_strs"] is None
    assert client.post("/detokenize", json={"tokens": actual["tokens"]}).json() == {"prompt": text, "content": text}


def test_tokens_of_a_chat_equal_the_prompt(live):
    messages = [{"role": "user", "content": "Hi <|end|>"}]
    actual = live.client.post("/tokenize", json={"messages": messages}).json()["tokens"]
    live.client.post("/v1/chat/completions", json={"messages": messages, "max_tokens": 1})
    assert live.engine.seen[-1].prompt == actual
    assert actual.count(live.engine.tokenizer.eos_token_id) == 1  # only the template's, not that in the message


def test_tokens_of_the_beginning_of_an_answer(client, byte_tokenizer):
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}]

    def text(**fields):
        return byte_tokenizer.decode(client.post("/tokenize", json={"messages": messages, **fields}).json()["tokens"])

    assert text() == "<|user|>Hi<|end|><|assistant|>Yes<|end|><|assistant|>"
    assert "weather" in text(tools=[{"type": "function", "function": {"name": "weather"}}])  # described as in a chat
    assert text(add_generation_prompt=False) == "<|user|>Hi<|end|><|assistant|>Yes<|end|>"
    assert text(continue_final_message=True, add_generation_prompt=False) == "<|user|>Hi<|end|><|assistant|>Yes"


@pytest.mark.parametrize(
    "body", [{}, {"prompt": "x", "messages": [{"role": "user", "content": "x"}]}, {"prompt": 1}, {"messages": []}]
)
def test_texts_that_cannot_be_tokenized(refused, body):
    refused("/tokenize", body)


@pytest.mark.parametrize("tokens", [None, "1", [-1], [261], [2**63], [1.5], ["x"], [[1]]])
def test_invalid_token_lists(refused, tokens):
    refused("/detokenize", {"tokens": tokens})


def test_metrics_have_handlers_and_no_client_supplied_names(client):
    client.get("/made-up-by-a-client")
    client.request("MADEUP", "/health")
    response = client.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain")
    assert 'http_requests_total{handler="/v1/completions",method="POST",status="200"}' in response.text
    assert 'handler="other",method="GET",status="404"' in response.text
    assert "made-up" not in response.text and "MADEUP" not in response.text
    assert 'http_request_duration_seconds_bucket{handler="/v1/completions",le="+Inf",method="POST"}' in response.text


def test_health_and_ready(client):
    assert client.get("/health").json() == {"status": "ok"} and client.get("/ready").json() == {"status": "ok"}


def test_the_error_of_an_unknown_model_names_nothing_else(client):
    actual = client.post("/v1/completions", json={"prompt": "x", "model": "../secret"})
    assert_error(actual, 404, "model")
    assert "secret" not in actual.text and actual.json()["error"]["code"] == "model_not_found"
