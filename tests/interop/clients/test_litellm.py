"""LiteLLM: as an OpenAI server, as vLLM, and as Ollama."""

from __future__ import annotations

import litellm
import pytest

from .conftest import MODEL, tool_call
from .test_openai import WEATHER

HELLO = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def url(start):
    def answer(prompt: str) -> str:
        return tool_call("weather", city="Rom") if "<tools>" in prompt else "Hello 😀!"

    return start(answer).url


def of(provider: str, url: str) -> dict:
    """Arguments of a call to this provider."""
    path = "" if provider.startswith("ollama") else "/v1"
    return {"model": f"{provider}/{MODEL}", "api_base": f"{url}{path}", "api_key": "none", "num_retries": 0}


@pytest.mark.parametrize("provider", ["openai", "hosted_vllm", "ollama_chat"])
def test_chats(url, provider):
    assert litellm.completion(messages=HELLO, **of(provider, url)).choices[0].message.content == "Hello 😀!"
    pieces = litellm.completion(messages=HELLO, stream=True, **of(provider, url))
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == "Hello 😀!"


@pytest.mark.parametrize("provider", ["openai", "hosted_vllm", "ollama_chat"])
def test_tools(url, provider):
    message = litellm.completion(messages=HELLO, tools=[WEATHER], **of(provider, url)).choices[0].message
    assert message.tool_calls[0].function.name == "weather"


def test_the_messages_protocol(url):
    reply = litellm.completion(model=f"anthropic/{MODEL}", api_base=url, api_key="none", messages=HELLO, max_tokens=50)
    assert reply.choices[0].message.content == "Hello 😀!"


def test_other_calls(url):
    assert (
        litellm.text_completion(model=f"text-completion-openai/{MODEL}", prompt="hi", api_base=f"{url}/v1", api_key="none")
        .choices[0]
        .text
    )
    assert len(litellm.embedding(input=["a", "b"], **of("openai", url)).data) == 2
    assert litellm.responses(input="hi", **of("openai", url)).output[0].content[0].text == "Hello 😀!"
