"""OpenAI's package: fields without an effect here, stored responses, and answers by a schema."""

from __future__ import annotations

import openai
import pydantic
import pytest

from .conftest import MODEL, tool_call

HELLO = [{"role": "user", "content": "hi"}]
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
CLOCK = {"type": "function", "function": {"name": "clock", "parameters": {"type": "object", "properties": {}}}}


class Person(pydantic.BaseModel):
    name: str
    age: int


@pytest.fixture(scope="module")
def client(start):
    def answer(prompt: str) -> str:
        if "person" in prompt:
            return '{"name": "Ada", "age": 36}'
        return tool_call("weather", city="Rom") if "<tools>" in prompt and "<|tool|>" not in prompt else "Hello 😀!"

    return openai.OpenAI(base_url=f"{start(answer).url}/v1", api_key="none", max_retries=0)


@pytest.mark.parametrize(
    "fields",
    [
        {"verbosity": "low"},
        {"prediction": {"type": "content", "content": "Hello"}},
        {"web_search_options": {}},
        {"store": True, "metadata": {"a": "b"}, "user": "me", "safety_identifier": "me", "prompt_cache_key": "k"},
        {"service_tier": "auto", "parallel_tool_calls": True},
        {"seed": -1, "max_tokens": -1},
        {"temperature": None, "top_p": None, "stop": None, "n": None, "logit_bias": None, "response_format": None},
        {"extra_body": {"continuous_usage_stats": True, "cache_prompt": True, "priority": -1, "no_such_field": [1]}},
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_fields_without_an_effect(client, fields):
    assert client.chat.completions.create(model=MODEL, messages=HELLO, **fields).choices[0].message.content == "Hello 😀!"


def test_extra_fields_of_messages(client):
    messages = [
        {"role": "user", "content": "hi", "id": "m1", "timestamp": 1},
        {"role": "assistant", "content": "yes", "refusal": None},
    ]
    assert client.chat.completions.create(model=MODEL, messages=[*messages, *HELLO]).choices[0].finish_reason == "stop"


@pytest.mark.parametrize("method", ["create", "stream"])
def test_allowed_tools(client, method):
    choice = {
        "type": "allowed_tools",
        "allowed_tools": {"mode": "required", "tools": [{"type": "function", "function": {"name": "weather"}}]},
    }
    request = {"model": MODEL, "messages": HELLO, "tools": [CLOCK, WEATHER], "tool_choice": choice}
    if method == "create":
        message = client.chat.completions.create(**request).choices[0].message
    else:
        with client.chat.completions.stream(**request) as stream:
            message = stream.get_final_completion().choices[0].message
    assert [call.function.name for call in message.tool_calls] == ["weather"]
    assert not message.content


def test_parse(client):
    messages = [{"role": "user", "content": "a person"}]
    completion = client.chat.completions.parse(model=MODEL, messages=messages, response_format=Person)
    assert completion.choices[0].message.parsed == Person(name="Ada", age=36)
    response = client.responses.parse(model=MODEL, input="a person", text_format=Person)
    assert response.output_parsed == Person(name="Ada", age=36)


def test_stored_responses(client):
    first = client.responses.create(model=MODEL, input="hi", store=True)
    assert client.responses.retrieve(first.id).output_text == first.output_text == "Hello 😀!"
    second = client.responses.create(model=MODEL, input="again", previous_response_id=first.id)
    assert second.previous_response_id == first.id
    assert second.usage.input_tokens > first.usage.input_tokens
    client.responses.delete(first.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(first.id)


def test_legacy_completions_with_echo(client):
    completion = client.completions.create(model=MODEL, prompt="hi", max_tokens=0, echo=True, logprobs=1)
    assert completion.choices[0].text == "hi"
    assert completion.choices[0].logprobs.token_logprobs[0] is None


def test_base64_embeddings_have_unit_length(client):
    plain = client.embeddings.create(model=MODEL, input="hi", encoding_format="float").data[0].embedding
    packed = client.embeddings.create(model=MODEL, input="hi").data[0].embedding  # base64, decoded by the client
    assert packed == pytest.approx(plain, rel=1e-6)
    assert sum(x * x for x in plain) == pytest.approx(1, rel=1e-4)
    assert len(client.embeddings.create(model=MODEL, input="hi", dimensions=4).data[0].embedding) == 4
