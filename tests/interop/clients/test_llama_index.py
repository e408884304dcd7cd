"""LlamaIndex, by its class for servers like OpenAI's."""

from __future__ import annotations

import pydantic
import pytest
from llama_index.core.base.llms.types import ChatMessage
from llama_index.core.tools import FunctionTool
from llama_index.llms.openai_like import OpenAILike

from .conftest import MODEL, tool_call


class Person(pydantic.BaseModel):
    """A person."""

    name: str
    age: int


@pytest.fixture(scope="module")
def model(start):
    def answer(prompt: str) -> str:
        if "<tools>" not in prompt:
            return "Hello 😀!"
        return tool_call("Person", name="Ada", age=36) if "Person" in prompt else tool_call("weather", city="Rom")

    return OpenAILike(
        model=MODEL, api_base=f"{start(answer).url}/v1", api_key="none", is_chat_model=True, is_function_calling_model=True,
        max_retries=0, context_window=8192,
    )  # fmt: skip


def test_texts(model):
    assert model.complete("hi").text == "Hello 😀!"
    assert model.chat([ChatMessage("hi")]).message.content == "Hello 😀!"
    assert list(model.stream_chat([ChatMessage("hi")]))[-1].message.content == "Hello 😀!"


def test_tools(model):
    def weather(city: str) -> str:
        """The weather of a city."""
        return f"sunny in {city}"

    assert model.predict_and_call([FunctionTool.from_defaults(weather)], "weather?").response == "sunny in Rom"


def test_structured_output(model):
    person = model.as_structured_llm(Person).complete("a person").raw
    assert person == Person(name="Ada", age=36)
