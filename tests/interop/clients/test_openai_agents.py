"""OpenAI's Agents SDK: a tool and a handoff, over chat completions and over responses."""

from __future__ import annotations

import asyncio

import agents
import openai
import pytest

from .conftest import MODEL, tool_call


@agents.function_tool
def weather(city: str) -> str:
    """The weather of a city."""
    return f"sunny in {city}"


@pytest.fixture(scope="module")
def url(start):
    def answer(prompt: str) -> str:
        if "<|tool|>" in prompt or "<tools>" not in prompt:
            return "Hello 😀!"
        return tool_call("transfer_to_expert") if "transfer_to_expert" in prompt else tool_call("weather", city="Rom")

    agents.set_tracing_disabled(True)
    return f"{start(answer).url}/v1"


@pytest.fixture(params=["chat", "responses"])
def model(url, request):
    client = openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0)  # of one event loop
    kind = agents.OpenAIChatCompletionsModel if request.param == "chat" else agents.OpenAIResponsesModel
    return kind(model=MODEL, openai_client=client)


def test_tools(model):
    agent = agents.Agent(name="helper", instructions="Help", model=model, tools=[weather])
    result = asyncio.run(agents.Runner.run(agent, "weather?"))
    assert result.final_output == "Hello 😀!"
    assert [item.output for item in result.new_items if item.type == "tool_call_output_item"] == ["sunny in Rom"]


def test_handoffs(model):
    expert = agents.Agent(name="expert", instructions="Know", model=model)
    agent = agents.Agent(name="helper", instructions="Help", model=model, handoffs=[expert])
    result = asyncio.run(agents.Runner.run(agent, "ask the expert"))
    assert (result.last_agent.name, result.final_output) == ("expert", "Hello 😀!")


def test_streams(model):
    async def run() -> str:
        result = agents.Runner.run_streamed(agents.Agent(name="helper", model=model), "hi")
        async for _ in result.stream_events():
            pass
        return result.final_output

    assert asyncio.run(run()) == "Hello 😀!"
