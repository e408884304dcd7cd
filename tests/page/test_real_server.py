"""The page with the real server (and an engine without a model): its requests are accepted, figures appear, the CSP is met."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from deepseek_optimizer.server.keys import ApiKeys
from deepseek_optimizer.server.settings import ServerSettings
from support.fake_engine import FakeEngine
from support.live_server import LiveServer


@pytest.fixture
def live(byte_tokenizer: Any) -> Any:
    engine = FakeEngine(byte_tokenizer, lambda request: "**Hello** <b>you</b> 😀")
    with LiveServer(engine, ServerSettings(keys=ApiKeys(["sesame"]))) as server:
        yield server


@pytest.mark.every_run
def test_a_chat_with_every_setting_and_a_key(open_chat: Callable[..., Any], live: Any) -> None:
    chat = open_chat(["Failed to load resource"], live)
    chat.page.fill("#key-input", "sesame")
    chat.page.keyboard.press("Enter")
    chat.page.wait_for_function("() => document.getElementById('model').value === 'fake-model'")
    chat.page.click("#settings")
    chat.page.fill("#system-input", "Be kind.")
    values = {
        "temperature": 0,
        "top_p": 0.01,
        "top_k": 0,
        "min_p": 1,
        "max_tokens": 100,
        "repetition_penalty": 0.5,
        "seed": 2**53 - 1,
    }
    for name, value in values.items():
        chat.page.fill(f"#field-{name}", str(value))
    chat.page.click("#settings-dialog [type=submit]")
    chat.page.wait_for_selector("#settings-dialog", state="hidden")
    chat.ask("Hi")
    assert chat.answer() == "Hello <b>you</b> 😀"
    sampling = live.engine.seen[-1].sampling
    assert {name: getattr(sampling, name) for name in values} == values
    assert "of 4,096 tokens" in chat.page.inner_text("#context-text")
    assert chat.page.inner_text(".stats").split()[0].isdigit()  # the server's count
    assert live.engine.seen[-1].prompt  # the next request includes the previous turn
    chat.ask("Go on", answers=2)
    assert len(live.engine.seen[-1].prompt) > len(live.engine.seen[-2].prompt)
