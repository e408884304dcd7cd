"""Versions of a message: editing or regenerating preserves the earlier version, and the user switches between them."""

from __future__ import annotations

from threading import Event
from typing import Any

import pytest

from support.fake_chat_server import FakeChatServer, Reply, error_body

PREVIOUS, NEXT = "button[aria-label='Previous version']", "button[aria-label='Next version']"


def edit(chat: Any, index: int, text: str) -> None:
    chat.page.locator(".user").nth(index).hover()
    chat.page.locator(".user").nth(index).locator("button[aria-label='Edit and resend']").click()
    chat.page.fill(".editor textarea", text)
    chat.page.keyboard.press("Enter")


def shown(chat: Any) -> list[str]:
    """The messages, and their displayed versions."""
    texts: list[str] = chat.page.locator(".bubble, .assistant > .markdown, .versions").all_inner_texts()
    return [text.strip() for text in texts]


def test_editing_a_message_keeps_the_old_branch(chat: Any) -> None:
    chat.ask("one")
    chat.ask("two", answers=2)
    edit(chat, 0, "other")
    chat.wait_text("You said: other")
    chat.wait_done()
    assert shown(chat) == ["other", "2/2", "You said: other"]
    chat.page.locator(".user").hover()
    chat.page.click(PREVIOUS)
    assert shown(chat) == ["one", "1/2", "You said: one", "two", "You said: two"]
    assert chat.page.locator(".versions").get_attribute("aria-label") == "Version 1 of 2"
    assert chat.page.evaluate("document.activeElement.getAttribute('aria-label')") == "Next version"

    edit(chat, 1, "third")  # a branch within a branch
    chat.wait_text("You said: third")
    chat.wait_done(2)
    assert [message["content"] for message in chat.messages()] == ["one", "You said: one", "third"]
    chat.reload()
    chat.wait_text("You said: third")
    assert shown(chat) == ["one", "1/2", "You said: one", "third", "2/2", "You said: third"]
    chat.page.locator(".user").first.hover()
    chat.page.locator(NEXT).first.click()
    assert shown(chat) == ["other", "2/2", "You said: other"]
    chat.page.locator(".user").first.hover()
    chat.page.locator(PREVIOUS).first.click()
    assert shown(chat)[3:] == ["third", "2/2", "You said: third"]  # as it was left


@pytest.mark.every_run
def test_regenerating_keeps_the_first_answer(chat: Any, server: FakeChatServer) -> None:
    server.replies += [Reply(["first"]), Reply(["second"]), Reply(["third"])]
    chat.ask("Hi")
    for expected in ("second", "third"):
        chat.page.click("text=Answer again")
        chat.wait_text(expected, ".assistant")
        chat.wait_done()
    assert shown(chat) == ["Hi", "third", "3/3"]
    chat.page.click(PREVIOUS)
    chat.page.click(PREVIOUS)
    assert shown(chat) == ["Hi", "first", "1/3"]
    assert chat.page.locator(PREVIOUS).is_disabled()
    chat.ask("go on", answers=2)
    assert [message["content"] for message in chat.messages()] == ["Hi", "first", "go on"]


def test_a_missing_answer_is_not_a_version(open_chat: Any, server: FakeChatServer) -> None:
    chat = open_chat(["Failed to load resource"])
    server.replies.append(Reply(status=503, error=error_body("no")))
    chat.ask("Hi")
    chat.page.click(".error button")
    chat.wait_text("You said: Hi")
    chat.wait_done()
    assert shown(chat) == ["Hi", "You said: Hi"]


def test_versions_cannot_be_switched_during_an_answer(chat: Any, server: FakeChatServer) -> None:
    more = Event()
    chat.ask("one")
    server.replies.append(Reply(["slow ", more, "answer"]))
    edit(chat, 0, "other")
    chat.wait_text("slow", ".assistant")
    chat.page.locator(".user").hover()
    chat.page.click(PREVIOUS)
    assert shown(chat)[0] == "other"
    more.set()
    chat.wait_text("slow answer", ".assistant")
