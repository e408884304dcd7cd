"""Pydantic AI: an agent with a tool and a typed result, over chat completions and over responses."""

from __future__ import annotations

import pydantic
import pytest
from pydantic_ai import Agent
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.openai import OpenAIProvider

from .conftest import MODEL, tool_call


class Person(pydantic.BaseModel):
    name: str
    age: int


@pytest.fixture(scope="module")
def provider(start):
    def answer(prompt: str) -> str:
        if "a person" in prompt:
            return tool_call("final_result", name="Ada", age=36)
        return tool_call("weather", city="Rom") if "<tools>" in prompt and "<|tool|>" not in prompt else "Hello 😀!"

    return OpenAIProvider(base_url=f"{start(answer).url}/v1", api_key="none")


@pytest.mark.parametrize("kind", [OpenAIChatModel, OpenAIResponsesModel])
def test_agents(provider, kind):
    agent, cities = Agent(kind(MODEL, provider=provider)), []

    @agent.tool_plain
    def weather(city: str) -> str:
        """The weather of a city."""
        cities.append(city)
        return "sunny"

    assert agent.run_sync("weather?").output == "Hello 😀!"
    assert cities == ["Rom"]


@pytest.mark.parametrize("kind", [OpenAIChatModel, OpenAIResponsesModel])
def test_typed_results(provider, kind):
    assert Agent(kind(MODEL, provider=provider), output_type=Person).run_sync("a person").output == Person(name="Ada", age=36)


async def _streamed(agent: Agent) -> str:
    async with agent.run_stream("hi") as result:
        return await result.get_output()


def test_streams(provider):
    import asyncio

    assert asyncio.run(_streamed(Agent(OpenAIChatModel(MODEL, provider=provider)))) == "Hello 😀!"
