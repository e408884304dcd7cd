"""Searching conversations, exporting and importing them, and starting new ones."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from support.fake_chat_server import FakeChatServer, Reply

IMAGE = "<img src=x onerror='window.pwned = 1'>"


@pytest.mark.every_run
def test_search_finds_titles_and_messages(chat: Any, server: FakeChatServer) -> None:
    server.replies += [Reply(["Lisbon has seven hills, and the sea is near."]), Reply(["def f(): pass"])]
    chat.ask("Where to go?")
    chat.page.click("#new-chat")
    chat.ask("Write a function")
    assert chat.titles() == ["Write a function", "Where to go?"]
    chat.page.keyboard.press("Control+k")
    chat.page.keyboard.type("SEVEN hills")
    chat.page.wait_for_function("() => document.querySelectorAll('.conversation').length === 1")
    assert chat.titles() == ["Where to go?"]
    assert chat.page.inner_text("mark") == "seven hills"
    chat.page.keyboard.press("ArrowDown")
    chat.page.keyboard.press("Enter")
    chat.wait_text("Lisbon")
    chat.page.fill("#search", "function")
    chat.page.wait_for_function("() => document.querySelector('.conversation').title === 'Write a function'")
    chat.page.fill("#search", "nowhere")
    chat.wait_text("No results", "#conversations")
    chat.page.press("#search", "Escape")
    assert len(chat.titles()) == 2


def choose(chat: Any, what: str) -> Path:
    with chat.page.expect_download() as download:
        chat.page.locator("#conversations li").first.hover()
        chat.page.locator("#conversations .icon-button").first.click()
        chat.page.click(f"#menu-{what}")
    path: Path = download.value.path()
    return path.rename(path.with_name(download.value.suggested_filename))


def test_export_as_markdown(chat: Any, server: FakeChatServer) -> None:
    server.replies.append(Reply(["Some **bold** words"]))
    chat.ask("Say something")
    path = choose(chat, "markdown")
    assert path.name == "Say-something.md"
    text = path.read_text()
    assert text.startswith("# Say something\n\n_tiny · ") or text.startswith("# Say something\n\n_")
    assert "\n## You\n\nSay something\n\n## Assistant\n\nSome **bold** words\n" in text


def test_exports_can_be_imported_with_all_versions(
    chat: Any, open_chat: Callable[..., Any], server: FakeChatServer, tmp_path: Path
) -> None:
    server.replies += [Reply(["first"]), Reply(["second"])]
    chat.ask("Hi")
    chat.page.click("text=Answer again")
    chat.wait_text("second", ".assistant")
    chat.wait_done()
    chat.page.click("#new-chat")
    chat.ask("other")
    with chat.page.expect_download() as download:
        chat.page.click("#export-all")
    assert download.value.suggested_filename == "conversations.json"
    exported = download.value.path()

    there = open_chat()  # another browser
    there.page.set_input_files("#import-input", exported)
    there.wait_text("Conversations imported: 2", "#notice")
    assert sorted(there.titles()) == ["Hi", "other"]
    there.reload()
    there.page.click(".conversation[title=Hi]")
    there.wait_text("second", ".assistant")
    there.page.click("button[aria-label='Previous version']")
    assert there.answer() == "first"
    there.page.set_input_files("#import-input", exported)  # a second import replaces nothing
    there.page.wait_for_function("() => document.querySelectorAll('.conversation').length === 4")


def test_a_file_of_format_version_1_is_imported(chat: Any, tmp_path: Path) -> None:
    messages = [{"id": "a", "role": "user", "content": "old"}, {"id": "b", "role": "assistant", "content": "answer"}]
    old = {"format": "deepseek-optimizer-chat", "version": 1, "conversation": {"id": "x", "title": "old", "messages": messages}}
    (tmp_path / "old.json").write_text(json.dumps(old))
    chat.page.set_input_files("#import-input", tmp_path / "old.json")
    chat.wait_text("answer", ".assistant")


@pytest.mark.parametrize("content", ["", "{", "[]", "null", '{"format": "deepseek-optimizer-chat"}', '{"conversations": [1]}'])
def test_other_files_are_rejected(chat: Any, tmp_path: Path, content: str) -> None:
    (tmp_path / "other.json").write_text(content)
    chat.page.set_input_files("#import-input", tmp_path / "other.json")
    chat.wait_text("other.json contains no conversations", "#notice")
    assert chat.titles() == []


def test_a_malicious_file_is_text_and_refers_to_no_document(chat: Any, tmp_path: Path) -> None:
    user = {"id": IMAGE, "role": "user", "content": IMAGE, "version": IMAGE, "files": [{"id": "file-1", "name": IMAGE}]}
    tail = {"parent": {"a": 1}, "messages": [{"role": IMAGE, "content": {"a": 1}}]}
    hostile = {"title": IMAGE, "settings": {"temperature": IMAGE}, "messages": [user, None, 7], "others": [tail, None, 3]}
    file = {"format": "deepseek-optimizer-chat", "version": 2, "conversations": [hostile]}
    (tmp_path / "hostile.json").write_text(json.dumps(file))
    chat.page.set_input_files("#import-input", tmp_path / "hostile.json")
    chat.wait_text(IMAGE, ".bubble")
    chat.ask("more", answers=2)
    assert "file-1" not in json.dumps(chat.server.bodies[-1])
    assert chat.page.evaluate("window.pwned") is None
    chat.page.locator("#conversations li").hover()
    chat.page.click("#conversations .icon-button")
    chat.page.click("#menu-delete")
    chat.page.click("#delete-dialog [type=submit]")
    chat.wait_text("No conversations yet", "#conversations")
    assert not [url for url in chat.requests if "/v1/files" in url]


def test_an_example_fills_the_message_box(chat: Any, server: FakeChatServer) -> None:
    chat.page.click(".example >> nth=1")
    text = chat.page.input_value("#message")
    assert text.startswith("Write a Python function")
    assert server.bodies == []  # the user may edit it first
    chat.page.keyboard.press("Enter")
    chat.wait_done()
    assert chat.page.locator(".example").count() == 0


def test_each_setting_shows_its_effective_default(open_chat: Callable[..., Any], server: FakeChatServer) -> None:
    server.models[0]["default_sampling"] = {"temperature": 0.6, "top_p": 0.95, "top_k": IMAGE, "max_tokens": 4096}
    chat = open_chat()
    chat.page.click("#settings")
    shown = {
        name: chat.page.get_attribute(f"#field-{name}", "placeholder")
        for name in ("temperature", "top_p", "top_k", "max_tokens", "seed")
    }
    assert shown == {
        "temperature": "default: 0.6", "top_p": "default: 0.95", "top_k": "default", "max_tokens": "default: 4,096",
        "seed": "default: random",
    }  # fmt: skip


def test_new_chat_is_reachable_while_the_list_is_hidden(chat: Any, open_chat: Callable[..., Any]) -> None:
    assert not chat.page.locator("#new-chat-top").is_visible()
    chat.page.click("#close-sidebar")
    assert chat.page.locator("#new-chat-top").is_visible()
    phone = open_chat(viewport={"width": 390, "height": 844}, has_touch=True, is_mobile=True)
    phone.page.fill("#message", "Hi")
    phone.page.tap("#send")
    phone.wait_done()
    phone.page.tap("#new-chat-top")
    assert phone.page.locator(".message").count() == 0


def test_without_the_libraries_answers_are_plain_text_and_the_page_says_so(
    open_chat: Callable[..., Any], server: FakeChatServer
) -> None:
    server.libraries = False
    server.replies.append(Reply([f"**bold** {IMAGE}"]))
    chat = open_chat(["Failed to load resource", "could not be loaded"])
    with chat.page.expect_console_message(lambda message: "could not be loaded" in message.text) as logged:
        chat.reload()
    assert logged.value.type == "warning"
    assert "without formatting" in chat.page.inner_text("#plain-text")
    chat.ask("Hi")
    assert chat.answer() == f"**bold** {IMAGE}"
    assert chat.page.evaluate("window.pwned") is None


def test_with_the_libraries_the_page_shows_no_notice(chat: Any) -> None:
    assert not chat.page.locator("#plain-text").is_visible()
