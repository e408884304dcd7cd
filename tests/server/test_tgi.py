"""TGI's /generate, with huggingface_hub's own client."""

from __future__ import annotations

import pytest
from huggingface_hub import InferenceClient
from huggingface_hub.errors import HfHubHTTPError


@pytest.fixture
def hub(live, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)  # the server is on this machine
    return InferenceClient(live.url)


def test_a_text(live, hub):
    text = hub.text_generation("hello", max_new_tokens=12)
    assert text.startswith("Answer") and len(text) == 12
    assert live.engine.seen[-1].sampling.temperature == 0  # greedy without sampling parameters, as in TGI
    assert hub.text_generation("hello", max_new_tokens=12, return_full_text=True) == "hello" + text
    assert InferenceClient(f"{live.url}/generate").text_generation("hello", max_new_tokens=12) == text
    hub.text_generation("hello", max_new_tokens=2, do_sample=True, temperature=0.5, seed=3)
    assert live.engine.seen[-1].sampling.temperature == 0.5


def test_details(hub):
    answer = hub.text_generation("hello", max_new_tokens=200, details=True, stop=[":"], top_n_tokens=2)
    assert answer.generated_text.endswith(":") and answer.details.finish_reason == "stop_sequence"
    assert answer.details.generated_tokens == len(answer.details.tokens) == len(answer.details.top_tokens)
    assert "".join(token.text for token in answer.details.tokens) == answer.generated_text


def test_a_stream(live, hub):
    whole = hub.text_generation("hello", max_new_tokens=200)
    assert "".join(hub.text_generation("hello", max_new_tokens=200, stream=True)) == whole and "😀" in whole
    events = list(hub.text_generation("hello", max_new_tokens=5, stream=True, details=True))
    assert [event.index for event in events] == [1, 2, 3, 4, 5]
    assert events[-1].generated_text == whole[:5] and events[-1].details.finish_reason == "length"
    assert live.client.post("/generate_stream", json={"inputs": "x"}).headers["content-type"].startswith("text/event-stream")


def test_a_grammar(hub):
    grammar = {"type": "regex", "value": "[0-9]{3}"}
    assert hub.text_generation("hello", grammar=grammar, max_new_tokens=9).isdigit()


def test_errors(live, hub):
    with pytest.raises(HfHubHTTPError, match="max_new_tokens"):
        hub.text_generation("hello", max_new_tokens=0)
    error = live.client.post("/generate", json={}).json()
    assert error["error_type"] == "validation" and "inputs" in error["error"]


def test_chats_without_a_model_name(hub):
    answer = hub.chat_completion([{"role": "user", "content": "hi"}], max_tokens=9)
    assert answer.choices[0].message.content.startswith("Answer")
