"""OpenAI's own client with a live server."""

from __future__ import annotations

import base64
import json
from typing import Literal

import numpy as np
import openai
import pydantic
import pytest

from deepseek_optimizer.server.keys import ApiKeys
from deepseek_optimizer.server.settings import ServerSettings
from support.chats import HERMES, WEATHER
from support.fake_engine import FakeEngine
from support.live_server import LiveServer, wait_for

MESSAGES = [{"role": "system", "content": "Be brief"}, {"role": "user", "content": "hi"}]
MODEL = "fake-model"


@pytest.fixture(scope="module")
def server(byte_tokenizer, grammars):
    settings = ServerSettings(keys=ApiKeys(["alpha"]))
    with LiveServer(FakeEngine(byte_tokenizer), settings, grammars=grammars) as live:
        yield live


@pytest.fixture(scope="module")
def client(server):
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="alpha", max_retries=0)


@pytest.fixture(scope="module")
def tools_client(byte_tokenizer, grammars):
    import copy

    tokenizer = copy.deepcopy(byte_tokenizer)
    tokenizer.chat_template = HERMES

    def script(request):
        if "sunny" in tokenizer.decode(request.prompt):
            return "It is sunny."
        return '<tool_call>\n{"name": "weather", "arguments": {"city": "Rom"}}\n</tool_call>'

    with LiveServer(FakeEngine(tokenizer, script=script), grammars=grammars) as live:
        yield openai.OpenAI(base_url=f"{live.url}/v1", api_key="none", max_retries=0)


def test_models(client):
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).object == "model"


def test_chat_and_its_stream(client):
    whole = client.chat.completions.create(model=MODEL, messages=MESSAGES, seed=1)
    stream = client.chat.completions.create(
        model=MODEL, messages=MESSAGES, seed=1, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content and "😀" in text
    assert chunks[-1].usage == whole.usage and whole.usage.total_tokens > 10
    assert whole.choices[0].finish_reason == "stop"


def test_the_streams_helper(client):
    with client.chat.completions.stream(model=MODEL, messages=MESSAGES, seed=1) as stream:
        kinds = {event.type for event in stream}
        final = stream.get_final_completion()
    assert {"chunk", "content.delta", "content.done"} <= kinds
    assert final.choices[0].message.content == client.chat.completions.create(
        model=MODEL, messages=MESSAGES, seed=1
    ).choices[0].message.content  # fmt: skip


def test_closing_a_stream(server, client):
    stream = client.chat.completions.create(
        model=MODEL, messages=MESSAGES, max_tokens=3000, stream=True, extra_body={"ignore_eos": True}
    )
    next(iter(stream))
    stream.close()
    wait_for(lambda: server.engine.admitted == 0)
    assert server.engine.ended[-1] == "cancelled"


def test_log_probabilities(client):
    actual = client.chat.completions.create(model=MODEL, messages=MESSAGES, logprobs=True, top_logprobs=3, max_tokens=5)
    content = actual.choices[0].logprobs.content
    assert len(content) == 5 and all(len(entry.top_logprobs) == 3 for entry in content)
    assert "".join(entry.token for entry in content) == actual.choices[0].message.content


class Report(pydantic.BaseModel):
    """The schema of the answer."""

    city: Literal["Rom"]
    sunny: bool


def test_a_schema_parsed_by_pydantic(client):
    actual = client.chat.completions.parse(model=MODEL, messages=MESSAGES, response_format=Report, max_tokens=200)
    assert isinstance(actual.choices[0].message.parsed, Report) and actual.choices[0].message.parsed.city == "Rom"


def test_tools(tools_client):
    messages = [{"role": "user", "content": "weather in Rom?"}]
    choice = tools_client.chat.completions.create(model=MODEL, messages=messages, tools=[WEATHER]).choices[0]
    assert choice.finish_reason == "tool_calls"
    (call,) = choice.message.tool_calls
    assert call.function.name == "weather" and json.loads(call.function.arguments) == {"city": "Rom"}
    messages += [choice.message, {"role": "tool", "tool_call_id": call.id, "content": "sunny"}]
    answer = tools_client.chat.completions.create(model=MODEL, messages=messages, tools=[WEATHER])
    assert answer.choices[0].message.content == "It is sunny."


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}])
def test_tools_in_a_stream(tools_client, choice):
    with tools_client.chat.completions.stream(
        model=MODEL, messages=[{"role": "user", "content": "x"}], tools=[WEATHER], tool_choice=choice
    ) as stream:
        final = stream.get_final_completion().choices[0]
    assert final.finish_reason == "tool_calls"
    assert json.loads(final.message.tool_calls[0].function.arguments) == {"city": "Rom"}


def test_completions(client):
    actual = client.completions.create(model=MODEL, prompt=["a", "b"], max_tokens=9, logprobs=2, n=2)
    assert [choice.index for choice in actual.choices] == [0, 1, 2, 3] and actual.choices[0].text.startswith("Answer")
    chunks = list(client.completions.create(model=MODEL, prompt="a", max_tokens=9, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == actual.choices[0].text


def test_embeddings(client):
    """The client requests base64 by default."""
    actual = client.embeddings.create(model=MODEL, input=["a", "bb"])
    plain = client.embeddings.create(model=MODEL, input=["a", "bb"], encoding_format="float")
    assert [one.embedding for one in actual.data] == [pytest.approx(one.embedding) for one in plain.data]
    raw = client.embeddings.with_raw_response.create(model=MODEL, input=[[1, 2]], encoding_format="base64").text
    vector = np.frombuffer(base64.b64decode(json.loads(raw)["data"][0]["embedding"]), "<f4")
    assert vector.shape == (8,) and actual.usage.prompt_tokens == 3


def test_responses(client):
    whole = client.responses.create(model=MODEL, input="hi", instructions="Be brief")
    assert whole.output_text.startswith("Answer") and whole.status == "completed" and whole.usage.output_tokens > 5
    again = [*whole.output, {"role": "user", "content": "more"}]
    assert client.responses.create(model=MODEL, input=[{"role": "user", "content": "hi"}, *again]).output_text
    events = list(client.responses.create(model=MODEL, input="hi", instructions="Be brief", stream=True))
    assert "".join(e.delta for e in events if e.type == "response.output_text.delta") == whole.output_text
    assert events[-1].type == "response.completed" and events[-1].response.output_text == whole.output_text
    with client.responses.stream(model=MODEL, input="hi", instructions="Be brief") as stream:
        for _ in stream:
            pass
        assert stream.get_final_response().output_text == whole.output_text


def test_responses_parsed_by_pydantic(client):
    actual = client.responses.parse(model=MODEL, input="hi", text_format=Report, max_output_tokens=200)
    assert actual.output_parsed.city == "Rom"


def test_responses_with_tools(tools_client):
    tool = {"type": "function", **WEATHER["function"]}
    items: list = [{"role": "user", "content": "weather in Rom?"}]
    actual = tools_client.responses.create(model=MODEL, input=items, tools=[tool])
    (call,) = actual.output
    assert call.type == "function_call" and json.loads(call.arguments) == {"city": "Rom"}
    items += [call, {"type": "function_call_output", "call_id": call.call_id, "output": "sunny"}]
    assert tools_client.responses.create(model=MODEL, input=items, tools=[tool]).output_text == "It is sunny."
    events = list(tools_client.responses.create(model=MODEL, input=items[:1], tools=[tool], stream=True))
    kinds = [event.type for event in events]
    assert "response.function_call_arguments.done" in kinds and kinds[-1] == "response.completed"


@pytest.mark.parametrize(
    "error,call",
    [
        (openai.AuthenticationError, lambda c: c.with_options(api_key="beta").models.list()),
        (openai.NotFoundError, lambda c: c.chat.completions.create(model="other", messages=MESSAGES)),
        (openai.BadRequestError, lambda c: c.chat.completions.create(model=MODEL, messages=[])),
        (openai.BadRequestError, lambda c: c.responses.create(model=MODEL, input="x", previous_response_id="resp_1")),
        (openai.NotFoundError, lambda c: c.models.retrieve("other")),
    ],
)
def test_errors_map_to_the_clients_exceptions(client, error, call):
    with pytest.raises(error) as caught:
        call(client)
    assert caught.value.body["message"]


def test_a_failure_in_the_middle_of_a_stream_is_an_error(server, client, monkeypatch):
    monkeypatch.setattr(server.engine, "step_seconds", 0.01)  # 3,000 tokens do not end before the failure
    stream = iter(
        client.chat.completions.create(
            model=MODEL, messages=MESSAGES, max_tokens=3000, stream=True, extra_body={"ignore_eos": True}
        )
    )
    next(stream)
    wait_for(lambda: server.engine.running == 1)
    server.call(server.engine.fail)
    with pytest.raises(openai.APIError, match="generation failed"):
        list(stream)
