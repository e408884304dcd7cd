"""smolagents: an agent that calls tools, and one that writes code."""

from __future__ import annotations

import pytest
import smolagents

from .conftest import MODEL, tool_call


@smolagents.tool
def weather(city: str) -> str:
    """The weather of a city.

    Args:
        city: its name
    """
    return f"sunny in {city}"


def connect(start, answer):
    return smolagents.OpenAIModel(model_id=MODEL, api_base=f"{start(answer).url}/v1", api_key="none")


@pytest.mark.parametrize("stream", [False, True])
def test_an_agent_that_calls_tools(start, stream):
    def answer(prompt: str) -> str:
        return tool_call("final_answer", answer="sunny") if "sunny in Rom" in prompt else tool_call("weather", city="Rom")

    agent = smolagents.ToolCallingAgent([weather], connect(start, answer), max_steps=3, stream_outputs=stream)
    assert agent.run("The weather?") == "sunny"


def test_an_agent_that_writes_code(start):
    def answer(prompt: str) -> str:
        return "Thought: I look it up.\n<code>\nfinal_answer(weather('Rom'))\n</code>"

    agent = smolagents.CodeAgent([weather], connect(start, answer), max_steps=2)
    assert agent.run("The weather?") == "sunny in Rom"
