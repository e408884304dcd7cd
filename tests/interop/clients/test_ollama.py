"""Ollama's package."""

from __future__ import annotations

import ollama
import pytest

from .conftest import MODEL, tool_call

HELLO = [{"role": "user", "content": "hi"}]
SCHEMA = {"type": "object", "properties": {"name": {"const": "Ada"}}, "required": ["name"], "additionalProperties": False}


def weather(city: str) -> str:
    """The weather of a city.

    Args:
        city: its name
    """
    return f"sunny in {city}"


@pytest.fixture(scope="module")
def client(start):
    def answer(prompt: str) -> str:
        if "person" in prompt:
            return '{"name": "Ada"}'
        return tool_call("weather", city="Rom") if "<tools>" in prompt and "<|tool|>" not in prompt else "Hello 😀!"

    return ollama.Client(host=start(answer).url)


def test_chat(client):
    reply = client.chat(MODEL, HELLO, options={"temperature": 0, "num_predict": 50, "num_ctx": 2048}, keep_alive="5m")
    assert (reply.message.content, reply.done, reply.done_reason) == ("Hello 😀!", True, "stop")
    assert reply.eval_count > 0 and reply.prompt_eval_count > 0 and reply.total_duration > 0
    pieces = list(client.chat(MODEL, HELLO, stream=True))
    assert "".join(piece.message.content for piece in pieces) == "Hello 😀!"
    assert pieces[-1].done and not any(piece.done for piece in pieces[:-1])


def test_tools(client):
    reply = client.chat(MODEL, HELLO, tools=[weather])
    call = reply.message.tool_calls[0].function
    assert (call.name, call.arguments) == ("weather", {"city": "Rom"})
    turns = [*HELLO, reply.message, {"role": "tool", "tool_name": "weather", "content": weather(**call.arguments)}]
    assert client.chat(MODEL, turns, tools=[weather]).message.content == "Hello 😀!"


def test_format(client):
    assert client.chat(MODEL, [{"role": "user", "content": "a person"}], format=SCHEMA).message.content == '{"name": "Ada"}'
    assert client.generate(MODEL, "a person", format="json").response.startswith("{")


def test_generate(client):
    reply = client.generate(MODEL, "hi", system="Be brief")
    assert (reply.response, reply.done) == ("Hello 😀!", True)
    assert "".join(piece.response for piece in client.generate(MODEL, "hi", stream=True, raw=True)) == "Hello 😀!"


def test_models(client):
    assert [model.model for model in client.list().models] == [f"{MODEL}:latest"]
    shown = client.show(MODEL)
    assert "completion" in shown.capabilities and "tools" in shown.capabilities
    assert client.ps().models[0].model == f"{MODEL}:latest"
    with pytest.raises(ollama.ResponseError) as error:
        client.chat("none", HELLO)
    assert error.value.status_code == 404


def test_embed(client):
    vectors = client.embed(MODEL, ["a", "b"]).embeddings
    assert len(vectors) == 2 and sum(x * x for x in vectors[0]) == pytest.approx(1, rel=1e-4)
