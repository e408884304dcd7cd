"""Documents on the chat page, with the real server (and an engine without a model): attached, asked about, cited."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from deepseek_optimizer.server.keys import ApiKeys
from deepseek_optimizer.server.settings import ServerSettings
from support.documents import pdf
from support.fake_engine import FakeEngine
from support.live_server import LiveServer
from support.long_documents import prose

NOT_OK = ["Failed to load resource"]  # Chromium's console message for every status other than 200
HOSTILE = "<img src=x onerror='window.pwned = 1'>"
FACT = f"The green key {HOSTILE} is in the old lighthouse."
ANSWER = "The green key is in the old lighthouse."
DROP = """([files, type]) => {
  const data = new DataTransfer();
  for (const [name, text] of files) data.items.add(new File([text], name));
  const event = new DragEvent(type, { dataTransfer: data, bubbles: true, cancelable: true });
  document.getElementById('message').dispatchEvent(event);
}"""


@pytest.fixture(scope="module")
def running(byte_tokenizer: Any) -> Any:
    engine = FakeEngine(byte_tokenizer, lambda request: ANSWER)
    with LiveServer(engine, ServerSettings(max_file_bytes=200_000)) as live:
        yield live


@pytest.fixture
def live(running: Any) -> Any:
    running.engine.seen.clear()
    yield running
    for file in running.client.get("/v1/files").json()["data"]:
        running.client.delete(f"/v1/files/{file['id']}")


def attach(chat: Any, *files: tuple[str, bytes]) -> None:
    chat.page.set_input_files(
        "#file-input", [{"name": n, "mimeType": "application/octet-stream", "buffer": d} for n, d in files]
    )


def chips(chat: Any, where: str = "#files") -> list[str]:
    found: list[str] = chat.page.locator(f"{where} .chip").all_inner_texts()
    return [" | ".join(text.split("\n")) for text in found]


def wait_chips(chat: Any, count: int = 1) -> None:
    """Waits until there are this many files and none is being uploaded."""
    chat.page.wait_for_function(
        "n => document.querySelectorAll('#files .chip').length === n && !document.querySelector('#files progress')"
        " && ![...document.querySelectorAll('#files .chip-below')].some((one) => one.textContent === 'Reading…')",
        arg=count,
    )


def kept(live: Any) -> list[str]:
    return [file["filename"] for file in live.client.get("/v1/files").json()["data"]]


def test_a_pdf_is_attached_asked_about_and_cited(open_chat: Callable[..., Any], live: Any) -> None:
    chat = open_chat(live=live)
    attach(chat, ("map.pdf", pdf(["First page", FACT])))
    wait_chips(chat)
    assert chips(chat) == ["map.pdf | 1 kB · 2 pages"]
    chat.ask("Where is the green key?")
    assert chips(chat) == [] and chips(chat, ".user") == ["map.pdf | 1 kB · 2 pages"]
    prompt = live.engine.tokenizer.decode(live.engine.seen[-1].prompt)
    assert prompt.index(FACT) < prompt.index("Where is the green key?")
    citation = chat.page.locator(".citation")
    assert citation.locator("summary").inner_text().split("\n") == ["1", "map.pdf", "page 2"]
    assert not chat.page.locator("blockquote").is_visible()
    citation.locator("summary").focus()
    chat.page.keyboard.press("Enter")
    assert chat.page.locator("blockquote").inner_text() == FACT
    assert chat.page.evaluate("window.pwned") is None
    assert chat.page.locator("blockquote img").count() == 0

    chat.ask("And now?", answers=2)  # the file belongs to the conversation
    assert FACT in live.engine.tokenizer.decode(live.engine.seen[-1].prompt)
    chat.reload()
    chat.wait_text("And now?")
    assert chips(chat, ".user") == ["map.pdf | 1 kB · 2 pages"]
    assert chat.page.locator(".citation").count() == 2
    chat.page.locator(".citation summary").first.click()
    assert chat.page.locator("blockquote").first.inner_text() == FACT


def test_a_long_document_says_how_it_was_read(open_chat: Callable[..., Any], live: Any) -> None:
    chat = open_chat(live=live)
    attach(chat, ("book.txt", (prose(400) + FACT).encode()))
    wait_chips(chat)
    chat.ask("Where is the green key?")
    assert "received only passages" in chat.page.inner_text(".citations .hint")
    live.engine.frozen = False
    live.engine.step_seconds = 0.02
    try:
        chat.send("Summarize the document")
        chat.wait_text("Reading the documents:", ".reading")
    finally:
        live.engine.step_seconds = 0.0
    chat.wait_done(2)
    shown = chat.page.inner_text("#context-text")  # of the last prompt, not of all prompts
    assert int(shown.split()[0].replace(",", "")) < 4096, shown
    assert "tokens/s" not in chat.page.locator(".stats").last.inner_text()
    assert "processed in parts" in chat.page.locator(".citations .hint").last.inner_text()
    assert not chat.page.locator(".reading").last.is_visible()


@pytest.mark.every_run
def test_dropped_and_pasted(open_chat: Callable[..., Any], live: Any) -> None:
    chat = open_chat(live=live)
    files = [["a.txt", FACT], ["b.md", "# Title"]]
    chat.page.evaluate(DROP, [files, "dragenter"])
    assert chat.page.locator("#drop").is_visible()
    chat.page.evaluate(DROP, [files, "drop"])
    assert not chat.page.locator("#drop").is_visible()
    wait_chips(chat, 2)
    chat.page.evaluate(
        """() => {
          const clipboardData = new DataTransfer();
          clipboardData.items.add(new File(['pasted'], 'c.txt'));
          const event = new ClipboardEvent('paste', { clipboardData, bubbles: true, cancelable: true });
          document.getElementById('message').dispatchEvent(event);
        }"""
    )
    wait_chips(chat, 3)
    assert [chip.split(" | ")[0] for chip in chips(chat)] == ["a.txt", "b.md", "c.txt"]
    assert sorted(kept(live)) == ["a.txt", "b.md", "c.txt"]


def test_with_the_keyboard_alone(open_chat: Callable[..., Any], live: Any) -> None:
    chat = open_chat(live=live)
    with chat.page.expect_file_chooser() as choosing:
        chat.page.focus("#attach")
        chat.page.keyboard.press("Enter")
    assert choosing.value.is_multiple()
    choosing.value.set_files([{"name": "a.txt", "mimeType": "text/plain", "buffer": b"x"}])
    wait_chips(chat)
    assert chat.page.evaluate("document.activeElement.id") == "message"  # the message box has the focus
    chat.page.keyboard.press("Shift+Tab")  # the paper clip
    chat.page.keyboard.press("Shift+Tab")  # the cross
    assert chat.page.evaluate("document.activeElement.getAttribute('aria-label')") == "Remove a.txt"
    chat.page.keyboard.press("Enter")
    wait_chips(chat, 0)
    assert chat.page.evaluate("document.activeElement.id") == "message"
    chat.page.wait_for_function("async () => (await (await fetch('/v1/files')).json()).data.length === 0")


def test_unreadable_files_are_reported_and_the_rest_is_sent(open_chat: Callable[..., Any], live: Any) -> None:
    chat = open_chat(NOT_OK, live)
    attach(
        chat,
        ("locked.pdf", pdf(["x"], user="key")),
        ("big.txt", b"x" * 200_001),
        (f"{HOSTILE}.png", b"\x89PNG\r\n\x1a\n"),
        ("good.txt", FACT.encode()),
    )
    wait_chips(chat, 4)
    locked, big, image, good = chips(chat)
    assert "| Cannot be read: is encrypted and needs a password" in locked
    assert "Too large: the maximum is 200 kB" in big
    assert "PNG" in image and HOSTILE in image
    assert good.startswith("good.txt")
    assert chat.page.locator(".chip.failed").count() == 3
    assert chat.page.evaluate("window.pwned") is None
    chat.ask("Where is the green key?")
    assert [chip.split(" | ")[0] for chip in chips(chat, ".user")] == ["good.txt"]
    assert chat.page.locator(".citation").count() == 1


def test_a_server_without_files(open_chat: Callable[..., Any]) -> None:
    chat = open_chat(NOT_OK)  # the scripted one
    attach(chat, ("a.txt", b"x"))
    wait_chips(chat)
    assert "The server has no such model or path." in chips(chat)[0]


def test_drafts_keep_their_files_after_a_reload(open_chat: Callable[..., Any], live: Any) -> None:
    chat = open_chat(live=live)
    attach(chat, ("a.txt", FACT.encode()))
    wait_chips(chat)
    chat.page.fill("#message", "Where?")
    chat.reload()
    wait_chips(chat)
    assert chat.page.input_value("#message") == "Where?"
    chat.page.press("#message", "Enter")
    chat.wait_done()
    assert chat.page.locator(".citation").count() == 1
    chat.page.click("#new-chat")
    assert chips(chat) == []


def test_nothing_is_sent_during_an_upload(open_chat: Callable[..., Any], live: Any) -> None:
    chat = open_chat(live=live)
    held: list[Any] = []
    chat.page.route("**/v1/files", lambda route: held.append(route))
    attach(chat, ("a.txt", FACT.encode()))
    chat.page.wait_for_selector("#files .chip")
    chat.page.fill("#message", "Where is it?")
    chat.page.press("#message", "Enter")
    assert chat.page.is_disabled("#send") and live.engine.seen == []
    held[0].continue_()
    wait_chips(chat)
    assert chat.page.is_enabled("#send")
    chat.page.press("#message", "Enter")
    chat.wait_done()
    assert chat.page.locator(".citation").count() == 1


def test_an_expired_file(open_chat: Callable[..., Any], live: Any) -> None:
    chat = open_chat(NOT_OK, live)
    attach(chat, ("a.txt", FACT.encode()))
    wait_chips(chat)
    chat.ask("Where is the green key?")
    live.client.delete(f"/v1/files/{live.client.get('/v1/files').json()['data'][0]['id']}")
    chat.ask("And now?", answers=2)
    assert "no longer on the server" in chat.page.inner_text(".error strong")
    assert chips(chat, ".user") == ["a.txt | No longer on the server"]
    chat.page.click(".error button")
    chat.wait_done(2)
    assert chat.page.locator(".error").count() == 0
    assert FACT not in live.engine.tokenizer.decode(live.engine.seen[-1].prompt)


def test_editing_and_regenerating_keep_the_files(open_chat: Callable[..., Any], live: Any) -> None:
    chat = open_chat(live=live)
    attach(chat, ("a.txt", FACT.encode()))
    wait_chips(chat)
    chat.ask("Where?")
    chat.page.keyboard.press("ArrowUp")
    chat.page.keyboard.type(" is the key?")
    chat.page.keyboard.press("Enter")
    chat.wait_text("Where? is the key?", ".user")
    chat.wait_done()
    assert [chip.split(" | ")[0] for chip in chips(chat, ".user")] == ["a.txt"]
    chat.page.click("button[aria-label='Answer again']")
    chat.page.wait_for_function("() => !document.querySelector('[aria-busy=true]')")
    assert FACT in live.engine.tokenizer.decode(live.engine.seen[-1].prompt)
    chat.page.hover(".conversation")
    chat.page.click("#conversations .icon-button")
    chat.page.click("#menu-delete")
    chat.page.click("#delete-dialog [type=submit]")
    chat.page.wait_for_function("async () => (await (await fetch('/v1/files')).json()).data.length === 0")


def test_a_required_key(open_chat: Callable[..., Any], byte_tokenizer: Any) -> None:
    engine = FakeEngine(byte_tokenizer, lambda request: ANSWER)
    with LiveServer(engine, ServerSettings(keys=ApiKeys(["sesame"]))) as live:
        chat = open_chat(NOT_OK, live)
        chat.page.fill("#key-input", "sesame")
        chat.page.keyboard.press("Enter")
        chat.page.wait_for_function("() => document.getElementById('model').value === 'fake-model'")
        attach(chat, ("a.txt", FACT.encode()))
        wait_chips(chat)
        chat.ask("Where is the green key?")
        assert chat.page.locator(".citation").count() == 1


WIDE: dict[str, Any] = {"viewport": {"width": 1200, "height": 800}}
PHONE: dict[str, Any] = {"viewport": {"width": 360, "height": 640}, "has_touch": True, "is_mobile": True}
LOOKS = [(WIDE, "light"), (WIDE, "dark"), (PHONE, "light"), ({**PHONE, "locale": "zh-CN"}, "dark")]


@pytest.mark.parametrize("options,scheme", LOOKS)
def test_appearance(open_chat: Callable[..., Any], live: Any, options: dict[str, Any], scheme: str) -> None:
    from .test_appearance import FAINT, SMALL_TARGETS, UNNAMED

    chat = open_chat(NOT_OK, live, color_scheme=scheme, **options)
    attach(chat, ("map.pdf", pdf(["First page", FACT])), ("a-very-long-name-" * 8 + ".txt", FACT.encode()))
    chat.page.wait_for_function(
        "() => document.querySelectorAll('#files .chip-below').length === 2 && !document.querySelector('progress')"
    )
    chat.page.fill("#message", "Where is the green key?")
    chat.page.click("#send:enabled")
    chat.wait_done()
    chat.page.locator(".citation summary").first.click()
    attach(chat, ("locked.pdf", pdf(["x"], user="key")), ("notes.md", b"# Notes"))
    chat.page.wait_for_selector(".chip.failed")
    chat.page.wait_for_function("() => !document.querySelector('progress')")
    assert chat.page.evaluate(FAINT) == []
    assert chat.page.evaluate(UNNAMED) == []
    if "is_mobile" in options:
        assert chat.page.evaluate(SMALL_TARGETS) == []
        assert chat.page.evaluate("document.documentElement.scrollWidth") == 360
