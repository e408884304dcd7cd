"""`--thinking` and `--no-thinking`: reasoning of requests that do not say."""

from __future__ import annotations

import copy

import pytest

from deepseek_optimizer.server.settings import ServerSettings
from support.fake_engine import FakeEngine
from support.live_server import LiveServer

USER = [{"role": "user", "content": "hi"}]
SWITCHED = (  # as llama.cpp's templates of Command R7B and QwQ: reasoning unless it is turned off or not mentioned
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}[assistant]"
    "{% if not enable_thinking %}<think></think>{% endif %}"
)
OPENED = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]<think>\n{# </think> #}{% endif %}"
)
NAMED = "{% for m in messages %}{{ m.content }}{% endfor %}{{ thinking }}"


@pytest.fixture(scope="module")
def prompt(byte_tokenizer):
    """prompt(template, thinking, **body) -> the text of a prompt."""
    running = {}

    def render(template, thinking, path="/apply-template", **body):
        if (template, thinking) not in running:
            tokenizer = copy.deepcopy(byte_tokenizer)
            tokenizer.chat_template = template
            live = LiveServer(FakeEngine(tokenizer, script=lambda request: "a</think>b"), ServerSettings(thinking=thinking))
            running[template, thinking] = live.__enter__()
        live = running[template, thinking]
        response = live.client.post(path, json={"messages": USER, **body})
        assert response.status_code == 200, response.text
        return response.json()

    yield lambda *args, **body: render(*args, **body)["prompt"] if "path" not in body else render(*args, **body)
    for live in running.values():
        live.__exit__()


@pytest.mark.parametrize(("thinking", "end"), [(None, "<think></think>"), (True, "[assistant]"), (False, "<think></think>")])
def test_a_template_with_a_switch(prompt, thinking, end):
    assert prompt(SWITCHED, thinking).endswith(end)


@pytest.mark.parametrize(("thinking", "end"), [(None, "<think>\n"), (True, "<think>\n"), (False, "<think>\n</think>")])
def test_a_template_that_opens_reasoning(prompt, thinking, end):
    assert prompt(OPENED, thinking).endswith(end)


def test_an_answer_without_reasoning_has_none(prompt):
    path = "/v1/chat/completions"
    opened = prompt(OPENED, None, path=path)["choices"][0]["message"]
    assert (opened["reasoning_content"], opened["content"]) == ("a", "b")
    closed = prompt(OPENED, False, path=path)["choices"][0]["message"]
    assert "reasoning_content" not in closed and closed["content"] == "a</think>b"


def test_the_other_name_of_the_switch(prompt):
    assert prompt(NAMED, True) == "hiTrue" and prompt(NAMED, False) == "hiFalse" and prompt(NAMED, None) == "hi"


def test_requests_decide(prompt):
    assert prompt(SWITCHED, False, chat_template_kwargs={"enable_thinking": True}).endswith("[assistant]")
    assert prompt(SWITCHED, True, chat_template_kwargs={"enable_thinking": False}).endswith("</think>")
    path, body = "/v1/chat/completions", {"verbose": True, "max_tokens": 1}
    asked = prompt(SWITCHED, False, path=path, reasoning_effort="high", **body)
    assert asked["__verbose"]["prompt"].endswith("[assistant]")
    continued = {"messages": [*USER, {"role": "assistant", "content": "<think>"}], "continue_final_message": True}
    assert prompt(OPENED, False, path=path, **body, **continued)["__verbose"]["prompt"].endswith("[assistant]<think>")
