"""huggingface_hub's client, with the server's address and without the name of a model."""

from __future__ import annotations

import asyncio

import pytest
from huggingface_hub import AsyncInferenceClient, InferenceClient, constants

from .test_openai import WEATHER

HELLO = [{"role": "user", "content": "hi"}]


@pytest.fixture(autouse=True)
def online(monkeypatch):
    """tests/conftest.py forbids downloads; the client then refuses every address."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)


@pytest.fixture(scope="module")
def url(start):
    from .conftest import tool_call

    return start(lambda prompt: tool_call("weather", city="Rom") if "<tools>" in prompt else "Hello 😀!").url


@pytest.mark.parametrize("path", ["", "/v1"])
def test_chats_without_a_model(url, path):
    client = InferenceClient(base_url=f"{url}{path}")
    assert client.chat_completion(HELLO, max_tokens=50).choices[0].message.content == "Hello 😀!"
    pieces = client.chat.completions.create(messages=HELLO, stream=True, max_tokens=50)
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == "Hello 😀!"
    calls = client.chat_completion(HELLO, tools=[WEATHER], tool_choice="auto").choices[0].message.tool_calls
    assert calls[0].function.name == "weather"


def test_asynchronous_chats(url):
    async def chat() -> str:
        async with AsyncInferenceClient(base_url=url) as client:
            return (await client.chat_completion(HELLO)).choices[0].message.content

    assert asyncio.run(chat()) == "Hello 😀!"


def test_answers_by_a_schema(start):
    client = InferenceClient(base_url=start(lambda prompt: '{"name": "Ada"}').url)
    schema = {"type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"]}
    for given in (
        {"type": "json_object"},
        {"type": "json_schema", "json_schema": {"name": "person", "schema": schema, "strict": True}},
    ):
        assert client.chat_completion(HELLO, response_format=given).choices[0].message.content == '{"name": "Ada"}'
