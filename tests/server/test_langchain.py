"""LangChain's ChatOpenAI with a live server."""

from __future__ import annotations

import copy
from typing import Literal

import pydantic
import pytest
from langchain_openai import ChatOpenAI, OpenAIEmbeddings

from support.chats import HERMES
from support.fake_engine import FakeEngine
from support.live_server import LiveServer


class Weather(pydantic.BaseModel):
    """The weather of a city."""

    city: Literal["Rom"]


@pytest.fixture(scope="module")
def server(byte_tokenizer, grammars):
    tokenizer = copy.deepcopy(byte_tokenizer)
    tokenizer.chat_template = HERMES

    def script(request):
        if "tools" in tokenizer.decode(request.prompt):
            return '<tool_call>\n{"name": "Weather", "arguments": {"city": "Rom"}}\n</tool_call>'
        return "Hello 😀!"

    with LiveServer(FakeEngine(tokenizer, script=script), grammars=grammars) as live:
        yield live


@pytest.fixture(scope="module")
def model(server):
    return ChatOpenAI(base_url=f"{server.url}/v1", api_key="none", model="fake-model", temperature=0, max_retries=0)


def test_invoke_and_stream(model):
    answer = model.invoke([("system", "Be brief"), ("human", "hi")])
    assert answer.content == "Hello 😀!" and answer.usage_metadata["output_tokens"] > 5
    assert "".join(chunk.content for chunk in model.stream("hi")) == "Hello 😀!"


def test_bind_tools(model):
    calls = model.bind_tools([Weather]).invoke("weather?").tool_calls
    assert [(call["name"], call["args"]) for call in calls] == [("Weather", {"city": "Rom"})]
    chunks = list(model.bind_tools([Weather], tool_choice="Weather").stream("weather?"))
    whole = chunks[0]
    for chunk in chunks[1:]:
        whole += chunk
    assert whole.tool_calls[0]["args"] == {"city": "Rom"}


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
def test_with_structured_output(model, method):
    assert model.with_structured_output(Weather, method=method).invoke("weather?") == Weather(city="Rom")


def test_the_responses_api(server):
    model = ChatOpenAI(base_url=f"{server.url}/v1", api_key="none", model="fake-model", use_responses_api=True, max_retries=0)
    assert model.invoke("hi").text == "Hello 😀!"
    assert "".join(chunk.text for chunk in model.stream("hi")) == "Hello 😀!"


def test_embeddings(server):
    model = OpenAIEmbeddings(
        base_url=f"{server.url}/v1", api_key="none", model="fake-model", check_embedding_ctx_length=False, max_retries=0
    )
    assert len(model.embed_documents(["a", "b"])) == 2 and len(model.embed_query("a")) == 8
