"""The chat page from a user's view: sending, reading a stream, stopping, regenerating, editing, reloading."""

from __future__ import annotations

import json
from collections.abc import Callable
from threading import Event
from typing import Any

import pytest

from support.fake_chat_server import FakeChatServer, Reply, Thought


@pytest.mark.every_run
def test_send_streams_and_shows_the_answer(chat: Any, server: FakeChatServer) -> None:
    more = Event()
    server.replies.append(Reply(["Hello ", "**wor", more, "ld**"]))
    chat.send("Hi")
    chat.wait_text("Hello wor", ".assistant")  # the partial answer is shown
    assert chat.page.locator(".assistant").get_attribute("aria-busy") == "true"
    more.set()
    chat.wait_done()
    assert chat.answer() == "Hello world"
    assert chat.page.locator(".assistant strong").inner_text() == "world"
    assert chat.page.locator(".bubble").inner_text() == "Hi"
    assert server.bodies == [
        {
            "model": "tiny",
            "messages": [{"role": "user", "content": "Hi"}],
            "stream": True,
            "stream_options": {"include_usage": True},
        }
    ]


def test_history_is_sent_without_reasoning(chat: Any, server: FakeChatServer) -> None:
    server.replies.append(Reply([Thought("secret "), Thought("thought"), "An", "swer"]))
    chat.ask("one")
    chat.ask("two", answers=2)
    assert chat.messages() == [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "Answer"},
        {"role": "user", "content": "two"},
    ]


def test_reasoning_is_folded_with_its_duration(chat: Any, server: FakeChatServer) -> None:
    more = Event()
    server.replies.append(Reply([Thought("First *this*, "), Thought("then that."), more, "Done."]))
    chat.send("Hi")
    chat.wait_text("Thinking for", ".thinking summary")
    assert not chat.page.locator(".thinking .markdown").is_visible()
    more.set()
    chat.wait_done()
    chat.wait_text("Thought for", ".thinking summary")
    chat.page.click(".thinking summary")
    assert chat.page.locator(".thinking .markdown").inner_text() == "First this, then that."
    assert chat.answer() == "Done."


def test_stop_keeps_the_partial_answer_and_cancels_the_request(chat: Any, server: FakeChatServer) -> None:
    server.replies.append(Reply(["Some words", Event(), "never"]))
    chat.send("Hi")
    chat.wait_text("Some words")
    chat.page.click("#send")
    chat.wait_done()
    assert chat.answer() == "Some words"
    chat.wait_text("You stopped this answer")
    assert server.cut.wait(10)
    chat.ask("go on", answers=2)
    assert chat.messages()[1] == {"role": "assistant", "content": "Some words"}


def test_an_answer_can_be_regenerated(chat: Any, server: FakeChatServer) -> None:
    server.replies += [Reply(["first"]), Reply(["second"])]
    chat.ask("Hi")
    chat.page.click("text=Answer again")
    chat.wait_text("second", ".assistant")
    chat.wait_done()
    assert chat.page.locator(".assistant").count() == 1
    assert server.bodies[0] == server.bodies[1]


def test_editing_a_message_removes_later_ones(chat: Any) -> None:
    chat.ask("one")
    chat.ask("two", answers=2)
    chat.page.locator(".user").first.hover()
    chat.page.locator("button[aria-label='Edit and resend']").first.click()
    chat.page.fill(".editor textarea", "changed")
    chat.page.keyboard.press("Escape")  # cancels editing
    assert chat.page.locator(".bubble").first.inner_text() == "one"
    chat.page.locator("button[aria-label='Edit and resend']").first.click()
    chat.page.fill(".editor textarea", "changed")
    chat.page.keyboard.press("Enter")
    chat.wait_text("You said: changed")
    chat.wait_done()
    assert chat.page.locator(".bubble").all_inner_texts() == ["changed"]
    assert chat.messages() == [{"role": "user", "content": "changed"}]


def test_editing_during_an_answer_stops_it(chat: Any, server: FakeChatServer) -> None:
    server.replies.append(Reply(["old", Event()]))
    chat.send("one")
    chat.wait_text("old", ".assistant")
    chat.page.locator(".user").hover()
    chat.page.click("button[aria-label='Edit and resend']")
    chat.page.fill(".editor textarea", "new")
    chat.page.keyboard.press("Enter")
    chat.wait_text("You said: new")
    chat.wait_done()
    assert server.cut.wait(10)
    assert chat.page.locator("#send").get_attribute("aria-label") == "Send"


def test_a_conversation_survives_a_reload(chat: Any) -> None:
    chat.ask("one")
    chat.reload()
    chat.wait_text("You said: one")
    assert chat.titles() == ["one"]
    chat.ask("two", answers=2)
    assert len(chat.messages()) == 3


def test_a_reload_during_an_answer_keeps_the_partial_text(chat: Any, server: FakeChatServer) -> None:
    server.replies.append(Reply([Thought("hm"), "So far ", "and no further", Event()]))
    chat.send("Hi")
    chat.wait_text("no further", ".assistant")
    chat.reload()
    chat.wait_done()
    assert chat.answer() == "So far and no further"
    chat.wait_text("The page was closed before this answer was complete.")
    assert server.cut.wait(10)
    server.replies.append(Reply(["whole"]))
    chat.page.click("text=Answer again")
    chat.wait_text("whole", ".assistant")
    chat.wait_done()


def test_several_conversations(chat: Any, server: FakeChatServer) -> None:
    chat.ask("first question")
    chat.page.click("#new-chat")
    assert chat.page.locator(".message").count() == 0
    more = Event()
    server.replies.append(Reply(["slow ", more, "answer"]))
    chat.send("second question")
    chat.wait_text("slow", ".assistant")
    assert chat.titles() == ["second question", "first question"]

    chat.page.click(".conversation[title='first question']")  # the other answer continues meanwhile
    assert chat.answer() == "You said: first question"
    assert chat.page.locator(".busy").count() == 1
    assert chat.page.locator("#send").get_attribute("aria-label") == "Send"
    more.set()
    chat.page.wait_for_selector(".busy", state="detached")
    assert chat.answer() == "You said: first question"
    chat.page.go_back()
    chat.wait_text("slow answer", ".assistant")

    def choose(title: str, what: str) -> None:
        chat.page.locator("#conversations li", has_text=title).hover()
        chat.page.click(f"button[aria-label='Actions for “{title}”']")
        chat.page.click(f"#menu-{what}")

    choose("first question", "rename")
    chat.page.fill("#rename-input", "A new name")
    chat.page.keyboard.press("Enter")
    chat.page.wait_for_selector(".conversation[title='A new name']")

    with chat.page.expect_download() as download:
        choose("A new name", "json")
    assert download.value.suggested_filename == "A-new-name.json"
    exported = json.loads(download.value.path().read_text())
    assert exported["format"] == "deepseek-optimizer-chat"
    (conversation,) = exported["conversations"]
    assert [message["content"] for message in conversation["messages"]] == [
        "first question",
        "You said: first question",
    ]

    choose("second question", "delete")
    chat.page.click("#delete-dialog [data-close]")
    assert len(chat.titles()) == 2
    choose("second question", "delete")
    chat.page.click("#delete-dialog [type=submit]")
    chat.page.wait_for_selector(".conversation[title='second question']", state="detached")
    chat.reload()
    chat.page.wait_for_selector(".conversation[title='A new name']")
    assert chat.titles() == ["A new name"]


def test_settings_are_checked_sent_and_saved(chat: Any) -> None:
    chat.page.click("#settings")
    chat.page.fill("#system-input", "Be brief.")
    values = {
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 40,
        "min_p": 0.05,
        "max_tokens": 64,
        "repetition_penalty": 1.1,
        "seed": 7,
    }
    for name, value in values.items():
        chat.page.fill(f"#field-{name}", str(value))
    for name, wrong in [("temperature", "3"), ("top_k", "1.5"), ("max_tokens", "4097"), ("seed", "-1")]:
        chat.page.fill(f"#field-{name}", wrong)
        chat.page.click("#settings-dialog [type=submit]")
        assert chat.page.locator(f"#field-{name}").get_attribute("aria-invalid") == "true"
        assert chat.page.locator(f"#field-{name}-error").inner_text().startswith("Please enter")
        assert chat.page.evaluate("document.activeElement.id") == f"field-{name}"
        chat.page.fill(f"#field-{name}", str(values[name]))
    chat.page.click("#settings-dialog [type=submit]")
    chat.page.wait_for_selector("#settings-dialog", state="hidden")
    chat.ask("Hi")

    def sent() -> dict[str, Any]:
        body = chat.server.bodies[-1]
        assert body["messages"][0] == {"role": "system", "content": "Be brief."}
        return {name: body[name] for name in values}

    assert sent() == values
    chat.reload()
    chat.wait_text("You said: Hi")
    chat.ask("again", answers=2)
    assert sent() == values
    chat.page.click("#new-chat")  # settings belong to a conversation
    chat.ask("Hi")
    assert set(chat.server.bodies[-1]) == {"model", "messages", "stream", "stream_options"}


def test_settings_can_become_the_default(chat: Any) -> None:
    chat.page.click("#settings")
    chat.page.fill("#field-temperature", "0.3")
    chat.page.check("#settings-default")
    chat.page.click("#settings-dialog [type=submit]")
    chat.page.wait_for_selector("#settings-dialog", state="hidden")
    chat.reload()
    chat.page.click("#new-chat")
    chat.ask("Hi")
    assert chat.server.bodies[-1]["temperature"] == 0.3


def test_the_model_is_chosen_for_each_conversation(open_chat: Callable[..., Any], server: FakeChatServer) -> None:
    server.models = [{"id": "small", "max_model_len": 1000}, {"id": "large", "max_model_len": 2000}]
    chat = open_chat()
    chat.page.select_option("#model", "large")
    chat.ask("Hi")
    assert server.bodies[-1]["model"] == "large"
    assert "of 2,000 tokens" in chat.page.inner_text("#context-text")
    chat.page.click("#new-chat")
    assert chat.page.input_value("#model") == "small"
    chat.reload()
    chat.page.click(".conversation")
    chat.wait_text("You said")
    assert chat.page.input_value("#model") == "large"


def test_figures_of_an_answer(chat: Any, server: FakeChatServer) -> None:
    more = Event()
    usage = {"prompt_tokens": 3000, "completion_tokens": 7, "dropped_tokens": 1234, "context_tokens": 1773}
    server.replies.append(Reply(["a ", "b ", more, "c"], usage=usage, finish="length"))
    chat.send("Hi")
    chat.wait_text("≈ 2 tokens", "#speed")  # the number of chunks, until the server's count arrives
    assert "first token after" in chat.page.inner_text("#speed")
    chat.page.wait_for_timeout(150)  # a speed needs some time
    more.set()
    chat.wait_done()
    stats = chat.page.inner_text(".stats")
    assert stats.startswith("7 tokens · ") and "tokens/s" in stats and "first token after" in stats
    assert chat.page.inner_text("#context-text") == "1,773 of 4,096 tokens (43 %)"
    assert chat.page.locator("#context-meter").get_attribute("aria-valuenow") == "43"
    chat.wait_text("The oldest 1,234 tokens were dropped from the context window.")
    chat.wait_text("The answer reached its maximum length.")


def test_scrolling_up_stops_following_the_text(chat: Any, server: FakeChatServer) -> None:
    first, second, third = Event(), Event(), Event()
    lines = "line\n\n" * 40
    server.replies.append(Reply([lines, first, lines, "second", second, lines, "third", third, "end"]))
    end = "() => { const s = document.getElementById('scroller'); return s.scrollHeight - s.scrollTop - s.clientHeight; }"
    chat.send("Hi")
    chat.wait_text("line", ".assistant")
    first.set()
    chat.wait_text("second", ".assistant")
    chat.page.wait_for_function(f"() => ({end})() < 2")
    chat.page.hover("#scroller")
    chat.page.mouse.wheel(0, -400)
    chat.page.wait_for_selector("#to-end", state="visible")
    top = chat.page.evaluate("document.getElementById('scroller').scrollTop")
    second.set()
    chat.wait_text("third", ".assistant")
    assert chat.page.evaluate("document.getElementById('scroller').scrollTop") == top
    chat.page.click("#to-end")
    third.set()
    chat.wait_done()
    chat.page.wait_for_function(f"() => ({end})() < 2")
    assert not chat.page.locator("#to-end").is_visible()


def test_copying_a_message_and_its_code(open_chat: Callable[..., Any], server: FakeChatServer) -> None:
    chat = open_chat(permissions=["clipboard-read", "clipboard-write"])
    source = "**Run** this:\n\n```sh\necho '<b>'\n```"
    server.replies.append(Reply([source]))
    chat.ask("Hi")
    chat.page.click(".copy-code")
    chat.wait_text("Copied", ".copy-code")
    assert chat.page.evaluate("navigator.clipboard.readText()") == "echo '<b>'"
    chat.page.click(".assistant button[aria-label='Copy message']")
    chat.wait_text("Copied", ".assistant .action")
    assert chat.page.evaluate("navigator.clipboard.readText()") == source
    chat.wait_text("Copied", "#announcer")


def test_another_tab_shows_an_answer_and_does_not_overwrite_it(chat: Any, server: FakeChatServer) -> None:
    chat.ask("one")
    other = chat.new_tab()
    other.click(".conversation")
    other.wait_for_selector(".assistant")
    more = Event()
    server.replies.append(Reply(["slow ", more, "answer"]))
    chat.send("two")
    other.wait_for_function("() => document.getElementById('thread').innerText.includes('slow')")
    other.fill("#message", "three")
    other.press("#message", "Enter")
    other.wait_for_function("() => document.getElementById('notice').textContent.includes('another tab')")
    assert other.input_value("#message") == "three"
    assert len(server.bodies) == 2
    more.set()
    other.wait_for_function("() => document.getElementById('thread').innerText.includes('slow answer')")
    other.press("#message", "Enter")
    other.wait_for_function("() => document.getElementById('thread').innerText.includes('You said: three')")
    assert len(chat.messages()) == 5


def test_drafts_survive_a_reload(chat: Any) -> None:
    chat.page.fill("#message", "half a thou")
    chat.reload()
    chat.page.wait_for_function("() => document.getElementById('message').value === 'half a thou'")


@pytest.mark.parametrize("storage", ["indexedDB", "localStorage"])
def test_a_browser_without_storage_can_chat(open_chat: Callable[..., Any], storage: str) -> None:
    chat = open_chat()
    chat.page.add_init_script(f"Object.defineProperty(window, '{storage}', {{get() {{ throw new Error('forbidden'); }}}})")
    chat.reload()
    if storage == "indexedDB":
        chat.wait_text("This browser does not allow the page to store data")
    chat.ask("Hi")
    assert chat.answer() == "You said: Hi"


def test_an_answer_is_saved_while_it_streams(chat: Any, server: FakeChatServer) -> None:
    """Not only in the unload event, since a browser may crash."""
    stored = """async () => {
      const request = indexedDB.open('deepseek-optimizer-chat');
      const database = await new Promise((resolve) => (request.onsuccess = () => resolve(request.result)));
      const all = database.transaction('conversations').objectStore('conversations').getAll();
      const found = await new Promise((resolve) => (all.onsuccess = () => resolve(all.result)));
      database.close();
      return found[0].messages[1]?.content === 'So far';
    }"""
    server.replies.append(Reply(["So far", Event()]))
    chat.send("Hi")
    chat.page.wait_for_function(stored)
    assert chat.page.locator("[aria-busy=true]").count() == 1
