"""Anthropic's package."""

from __future__ import annotations

import anthropic
import pytest

from .conftest import MODEL, tool_call

HELLO = [{"role": "user", "content": "hi"}]
WEATHER = {
    "name": "weather",
    "description": "Of a city",
    "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}


@pytest.fixture(scope="module")
def client(start):
    def answer(prompt: str) -> str:
        return tool_call("weather", city="Köln") if "<tools>" in prompt and "<|tool|>" not in prompt else "Hello 😀!"

    return anthropic.Anthropic(base_url=start(answer).url, api_key="none", max_retries=0)


def test_message(client):
    message = client.messages.create(model=MODEL, max_tokens=100, system="Be brief", messages=HELLO)
    assert [block.text for block in message.content] == ["Hello 😀!"]
    assert (message.stop_reason, message.role, message.type) == ("end_turn", "assistant", "message")
    assert message.usage.input_tokens > 0 and message.usage.output_tokens > 0
    assert client.messages.create(model=MODEL, max_tokens=2, messages=HELLO).stop_reason == "max_tokens"


def test_stream(client):
    with client.messages.stream(model=MODEL, max_tokens=100, messages=HELLO) as stream:
        assert "".join(stream.text_stream) == "Hello 😀!"
        assert stream.get_final_message().stop_reason == "end_turn"


def test_stop_sequences(client):
    message = client.messages.create(model=MODEL, max_tokens=100, stop_sequences=["llo"], messages=HELLO)
    assert (message.content[0].text, message.stop_reason, message.stop_sequence) == ("He", "stop_sequence", "llo")


@pytest.mark.parametrize(
    "choice", [{"type": "auto"}, {"type": "any"}, {"type": "tool", "name": "weather"}], ids=lambda c: c["type"]
)
def test_tools(client, choice):
    request = {"model": MODEL, "max_tokens": 200, "tools": [WEATHER], "messages": HELLO, "tool_choice": choice}
    message = client.messages.create(**request)
    call = message.content[-1]
    assert (call.type, call.name, call.input, message.stop_reason) == ("tool_use", "weather", {"city": "Köln"}, "tool_use")
    with client.messages.stream(**request) as stream:
        assert stream.get_final_message().content[-1].input == {"city": "Köln"}
    result = {"type": "tool_result", "tool_use_id": call.id, "content": "sunny"}
    turns = [*HELLO, {"role": "assistant", "content": message.content}, {"role": "user", "content": [result]}]
    final = client.messages.create(model=MODEL, max_tokens=200, tools=[WEATHER], messages=turns)
    assert final.content[0].text == "Hello 😀!"


def test_count_tokens(client):
    short = client.messages.count_tokens(model=MODEL, messages=HELLO).input_tokens
    used = client.messages.create(model=MODEL, max_tokens=1, messages=HELLO).usage
    assert short == used.input_tokens + (used.cache_read_input_tokens or 0) + (used.cache_creation_input_tokens or 0)
    assert client.messages.count_tokens(model=MODEL, messages=HELLO, tools=[WEATHER]).input_tokens > short


def test_errors(client):
    with pytest.raises(anthropic.NotFoundError) as error:
        client.messages.create(model="none", max_tokens=1, messages=HELLO)
    assert error.value.body["error"]["type"] == "not_found_error"
    with pytest.raises(anthropic.BadRequestError) as error:
        client.messages.create(model=MODEL, max_tokens=0, messages=HELLO)
    assert error.value.body["type"] == "error"
