"""Ollama's own client with a live server."""

from __future__ import annotations

import copy

import ollama
import pytest

from support.chats import HERMES, WEATHER
from support.fake_engine import FakeEngine
from support.live_server import LiveServer

MODEL = "fake-model"
USER = [{"role": "user", "content": "weather in Rom?"}]
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Rom"}}\n</tool_call>'


@pytest.fixture(scope="module")
def client(byte_tokenizer):
    tokenizer = copy.deepcopy(byte_tokenizer)
    tokenizer.chat_template = HERMES

    def script(request):
        prompt = tokenizer.decode(request.prompt)
        return CALL if "<tools>" in prompt and "sunny" not in prompt else "It is sunny."

    with LiveServer(FakeEngine(tokenizer, script=script)) as live:
        yield ollama.Client(live.url)


def test_a_chat_and_its_stream(client):
    whole = client.chat(MODEL, USER, options={"seed": 1, "num_predict": 50}, keep_alive="5m")
    assert whole.message.content == "It is sunny." and whole.done_reason == "stop" and whole.eval_count > 5
    stream = list(client.chat(f"{MODEL}:latest", USER, stream=True))
    assert "".join(part.message.content for part in stream) == whole.message.content and stream[-1].done


def weather(city: str) -> str:
    """The weather.

    Args:
        city: its name.
    """
    return f"sunny in {city}"


@pytest.mark.parametrize("tool", [WEATHER, weather])
def test_tools(client, tool):
    answer = client.chat(MODEL, USER, tools=[tool])
    (call,) = answer.message.tool_calls
    assert call.function.name == "weather" and call.function.arguments == {"city": "Rom"}
    messages = [*USER, answer.message, {"role": "tool", "tool_name": "weather", "content": "sunny"}]
    assert client.chat(MODEL, messages, tools=[tool]).message.content == "It is sunny."


def test_prompts(client):
    assert client.generate(MODEL, "hello", system="Be brief").response == "It is sunny."
    parts = client.generate(MODEL, "hello", raw=True, stream=True)
    assert "".join(part.response for part in parts) == "It is sunny."
    assert client.generate(MODEL).done_reason == "load"


def test_embeddings(client):
    assert len(client.embed(MODEL, ["a", "b"]).embeddings) == 2
    assert len(client.embeddings(MODEL, "a").embedding) == 8


def test_models(client):
    assert [model.model for model in client.list().models] == [f"{MODEL}:latest"]
    assert [model.model for model in client.ps().models] == [f"{MODEL}:latest"]
    assert "tools" in client.show(MODEL).capabilities


def test_errors(client):
    with pytest.raises(ollama.ResponseError) as caught:
        client.chat("llama3", USER)
    assert caught.value.status_code == 404
    with pytest.raises(ollama.ResponseError, match="images"):
        client.chat(MODEL, [{"role": "user", "content": "x", "images": [b"\x89PNG"]}])
