"""Anthropic's own client with a live server."""

from __future__ import annotations

import copy

import anthropic
import pytest

from deepseek_optimizer.server.keys import ApiKeys
from deepseek_optimizer.server.settings import ServerSettings
from support.chats import HERMES
from support.fake_engine import FakeEngine
from support.live_server import LiveServer

MODEL = "fake-model"
USER = [{"role": "user", "content": "weather in Rom?"}]
WEATHER = {
    "name": "weather",
    "description": "Of a city",
    "input_schema": {"type": "object", "properties": {"city": {"enum": ["Rom", "Köln"]}}, "required": ["city"]},
}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Rom"}}\n</tool_call>'


@pytest.fixture(scope="module")
def server(byte_tokenizer):
    tokenizer = copy.deepcopy(byte_tokenizer)
    tokenizer.chat_template = HERMES + "{# </think> #}"

    def script(request):
        prompt = tokenizer.decode(request.prompt)
        called = "<tools>" in prompt and "sunny" not in prompt
        return f"<think>\nhm\n</think>\n\n{CALL if called else 'It is sunny. END of it'}"

    with LiveServer(FakeEngine(tokenizer, script=script), ServerSettings(keys=ApiKeys(["alpha"]))) as live:
        yield live


@pytest.fixture(scope="module")
def client(server):
    return anthropic.Anthropic(base_url=server.url, api_key="alpha", max_retries=0)


def test_a_message(client):
    message = client.messages.create(model=MODEL, max_tokens=200, messages=USER, system="Be brief", stop_sequences=["END"])
    assert [block.type for block in message.content] == ["thinking", "text"]
    assert message.content[1].text == "It is sunny. " and message.stop_reason == "stop_sequence"
    assert message.usage.input_tokens > 5 and message._request_id


def test_a_stream(client):
    with client.messages.stream(model=MODEL, max_tokens=200, messages=USER) as stream:
        text = "".join(stream.text_stream)
        final = stream.get_final_message()
    assert text == final.content[-1].text == "It is sunny. END of it" and final.stop_reason == "end_turn"
    assert final.usage.output_tokens > 5
    events = list(client.messages.create(model=MODEL, max_tokens=200, messages=USER, stream=True))
    assert events[0].type == "message_start" and events[-1].type == "message_stop"


@pytest.mark.parametrize("stream", [False, True])
def test_tools(client, stream):
    fields = {"model": MODEL, "max_tokens": 200, "tools": [WEATHER], "thinking": {"type": "enabled", "budget_tokens": 1024}}
    if stream:
        with client.messages.stream(messages=USER, **fields) as events:
            message = events.get_final_message()
    else:
        message = client.messages.create(messages=USER, **fields)
    thought, call = message.content
    assert thought.thinking == "hm" and call.input == {"city": "Rom"} and message.stop_reason == "tool_use"
    result = {"type": "tool_result", "tool_use_id": call.id, "content": "sunny"}
    messages = [*USER, {"role": "assistant", "content": message.content}, {"role": "user", "content": [result]}]
    assert client.messages.create(messages=messages, **fields).content[-1].text.startswith("It is sunny")


def test_counting_tokens(client):
    assert client.messages.count_tokens(model=MODEL, messages=USER, tools=[WEATHER]).input_tokens > 50


@pytest.mark.parametrize(
    "error,change",
    [
        (anthropic.AuthenticationError, {"api_key": "beta"}),
        (anthropic.NotFoundError, {"model": "claude"}),
        (anthropic.BadRequestError, {"max_tokens": 0}),
    ],
)
def test_errors(client, error, change):
    fields = {"model": MODEL, "max_tokens": 9, "messages": USER, **{k: v for k, v in change.items() if k != "api_key"}}
    if "api_key" in change:
        client = client.with_options(api_key=change["api_key"])
    with pytest.raises(error) as caught:
        client.messages.create(**fields)
    assert caught.value.body["type"] == "error"


def test_a_token_in_the_header_of_openai(server):
    client = anthropic.Anthropic(base_url=server.url, auth_token="alpha", api_key=None, max_retries=0)
    assert client.messages.create(model=MODEL, max_tokens=9, messages=USER).content
