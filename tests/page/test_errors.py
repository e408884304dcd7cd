"""Error messages of the chat page, and that a conversation can continue after an error."""

from __future__ import annotations

from collections.abc import Callable
from threading import Event
from typing import Any

import pytest

from support.fake_chat_server import DROP, FakeChatServer, Reply, Thought, error_body

NOT_OK = ["Failed to load resource"]  # Chromium's console message for every status other than 200


def title(chat: Any) -> str:
    text: str = chat.page.inner_text(".error strong")
    return text


def test_no_key_then_a_wrong_one_then_the_right_one(open_chat: Callable[..., Any], server: FakeChatServer) -> None:
    server.api_key = "right"
    chat = open_chat(NOT_OK)
    dialog = chat.page.locator("#key-dialog")
    dialog.wait_for(state="visible")
    assert not chat.page.locator("#key-refused").is_visible()
    chat.page.fill("#key-input", "wrong")
    chat.page.keyboard.press("Enter")
    chat.page.wait_for_selector("#key-refused", state="visible")
    chat.page.fill("#key-input", "kéy 钥匙")  # not valid in a header, so not sent
    chat.page.keyboard.press("Enter")
    assert dialog.is_visible()
    chat.page.fill("#key-input", "right")
    chat.page.keyboard.press("Enter")
    dialog.wait_for(state="hidden")
    chat.page.wait_for_function("() => document.getElementById('model').value === 'tiny'")
    chat.ask("Hi")
    assert chat.answer() == "You said: Hi"
    assert chat.page.evaluate("[localStorage.getItem('dso.key'), sessionStorage.getItem('dso.key')]") == [None, "right"]

    server.api_key = "new"  # the key changes during the conversation: the question is sent again with the new key
    chat.send("more")
    dialog.wait_for(state="visible")
    chat.page.fill("#key-input", "new")
    chat.page.check("#key-keep")
    chat.page.keyboard.press("Enter")
    chat.wait_text("You said: more")
    chat.wait_done(2)
    assert chat.page.evaluate("[localStorage.getItem('dso.key'), sessionStorage.getItem('dso.key')]") == ["new", None]

    chat.page.click("#key")
    chat.page.click("#key-forget")
    dialog.wait_for(state="visible")  # the server requires a key again
    assert chat.page.evaluate("localStorage.getItem('dso.key')") is None
    chat.page.keyboard.press("Escape")
    chat.send("again")
    dialog.wait_for(state="visible")
    chat.page.keyboard.press("Escape")
    assert title(chat) == "The server requires an API key."


def test_busy_shows_when_to_retry(open_chat: Callable[..., Any], server: FakeChatServer) -> None:
    chat = open_chat(NOT_OK)
    server.replies.append(Reply(status=429, error=error_body("queue is full"), headers={"Retry-After": "7"}))
    chat.ask("Hi")
    assert title(chat) == "The server is busy. Please try again in 7 s."
    assert chat.page.inner_text(".error-detail") == "queue is full"
    chat.page.click(".error button")
    chat.wait_text("You said: Hi")
    assert chat.page.locator(".error").count() == 0


@pytest.mark.every_run
def test_errors_are_explained(open_chat: Callable[..., Any], server: FakeChatServer) -> None:
    chat = open_chat(NOT_OK)
    unknown = "The server has no such model or path."
    cases = [
        (Reply(status=400, error=error_body("too large")), "The server refused the request (HTTP 400).", "too large"),
        (Reply(status=404, error=error_body("no such model")), unknown, "no such model"),
        (Reply(status=502, error="<h1>Bad gateway</h1>"), "The server refused the request (HTTP 502).", "<h1>Bad gateway</h1>"),
        (Reply(["a"], error=error_body("NaN logits")), "The server encountered an error while answering.", "NaN logits"),
        (Reply(["a", DROP]), "The connection was closed before the answer was complete.", None),
    ]  # fmt: skip
    for reply, said, detail in cases:
        server.replies.append(reply)
        chat.ask("Hi")
        assert title(chat) == said
        assert chat.page.locator(".error-detail").all_inner_texts() == ([detail] if detail else [])
        chat.page.click("#new-chat")


def test_text_before_an_error_is_kept_and_sent(chat: Any, server: FakeChatServer) -> None:
    server.replies.append(Reply([Thought("hm"), "half", DROP]))
    chat.ask("Hi")
    assert chat.answer() == "half"
    chat.ask("go on", answers=2)
    assert [message["content"] for message in chat.messages()] == ["Hi", "half", "go on"]


def test_messages_around_a_missing_answer_are_joined(open_chat: Callable[..., Any], server: FakeChatServer) -> None:
    chat = open_chat(NOT_OK)
    server.replies.append(Reply(status=503))
    chat.ask("one")
    chat.ask("two", answers=2)
    assert chat.messages() == [{"role": "user", "content": "one\n\ntwo"}]


def test_an_unreachable_server(open_chat: Callable[..., Any], server: FakeChatServer) -> None:
    chat = open_chat(NOT_OK)
    chat.context.set_offline(True)
    chat.ask("Hi")
    assert title(chat) == "The server cannot be reached. Is it running?"
    chat.context.set_offline(False)
    chat.page.click(".error button")
    chat.wait_text("You said: Hi")


def test_broken_streams(open_chat: Callable[..., Any], server: FakeChatServer) -> None:
    """Chunks without choices, without a delta, with nulls: unknown content is ignored."""
    chat = open_chat()
    odd = [{"choices": []}, {"choices": [{}]}, {"choices": [{"delta": {"content": None, "reasoning_content": None}}]}]
    server.replies.append(Reply([*odd, "fine"]))
    chat.ask("Hi")
    assert chat.answer() == "fine"


def test_stopping_before_the_first_token(chat: Any, server: FakeChatServer) -> None:
    server.replies.append(Reply([Event()]))
    chat.send("Hi")
    chat.page.wait_for_selector(".waiting", state="visible")
    chat.page.keyboard.press("Escape")
    chat.wait_done()
    chat.wait_text("You stopped this answer")
    assert server.cut.wait(10)
