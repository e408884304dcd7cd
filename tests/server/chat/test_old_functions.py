"""OpenAI's older form of tools: `functions` and `function_call`."""

from __future__ import annotations

import copy
import json

import pytest

from support.chats import HERMES, WEATHER
from support.fake_engine import FakeEngine
from support.live_server import LiveServer, assert_error

PATH = "/v1/chat/completions"
USER = {"role": "user", "content": "Rome?"}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Rom"}}\n</tool_call>'


@pytest.fixture(scope="module")
def hermes(byte_tokenizer, grammars):
    tokenizer = copy.deepcopy(byte_tokenizer)
    tokenizer.chat_template = HERMES
    with LiveServer(FakeEngine(tokenizer, script=lambda request: CALL), grammars=grammars) as live:
        yield live


def ask(live, **fields):
    return live.client.post(PATH, json={"messages": [USER], "functions": [WEATHER["function"]], **fields})


@pytest.mark.parametrize("choice", [None, "auto", {"name": "weather"}])
def test_an_answer_has_a_function_call(hermes, choice):
    choice = ask(hermes, function_call=choice).json()["choices"][0]
    call = choice["message"]["function_call"]
    assert call["name"] == "weather" and json.loads(call["arguments"]).keys() == {"city"}
    assert choice["finish_reason"] == "function_call" and "tool_calls" not in choice["message"]


def test_a_stream_has_it_too(hermes):
    events = ask(hermes, stream=True).text.split("\n\n")[:-2]
    choices = [json.loads(event[6:])["choices"][0] for event in events]
    calls = [choice["delta"]["function_call"] for choice in choices if "function_call" in choice["delta"]]
    assert [call["name"] for call in calls if "name" in call] == ["weather"]
    assert json.loads("".join(call["arguments"] for call in calls)) == {"city": "Rom"}
    assert choices[-1]["finish_reason"] == "function_call"


def test_function_call_none(hermes):
    assert ask(hermes, function_call="none").json()["choices"][0]["message"]["content"] == CALL


def test_calls_and_results_in_messages_become_those_of_tools(hermes):
    messages = [
        USER,
        {"role": "assistant", "content": None, "function_call": {"name": "weather", "arguments": '{"city": "Rom"}'}},
        {"role": "function", "name": "weather", "content": "sunny"},
    ]
    assert ask(hermes, messages=messages, max_tokens=1).status_code == 200
    prompt = hermes.engine.tokenizer.decode(hermes.engine.seen[-1].prompt)
    assert '"city": "Rom"' in prompt and "<|tool|>sunny" in prompt


@pytest.mark.parametrize(
    "fields", [{"tools": [WEATHER]}, {"function_call": {"name": "other"}}, {"functions": []}, {"functions": [{"name": "a b"}]}]
)
def test_invalid_functions(hermes, fields):
    assert_error(ask(hermes, **fields), 400)
