"""Opens the chat page in headless Chromium, with a scripted server. Console errors and CSP violations fail a test."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from support.fake_chat_server import FakeChatServer, page_folder

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
READY = """() => document.querySelector('#model option')?.value
  || document.querySelector('dialog[open]') || document.getElementById('model-error').textContent"""
TIMEOUT_MS = 15000  # maximum time that a test waits; never reached by a test that passes


@pytest.fixture(
    scope="module"
)  # not per session: while Playwright is open, the thread has its event loop, and asyncio.run fails
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="the page's tests need playwright: pip install playwright")
    if CHROMIUM is None:
        pytest.skip("the page's tests need Chromium: apt-get install chromium")
    if not (page_folder() / "vendor").is_dir():
        pytest.fail("the page's libraries are missing: make page-assets")
    with playwright.sync_playwright() as engine:
        browser = engine.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-dev-shm-usage"])
        yield browser
        browser.close()


@pytest.fixture
def server() -> Iterator[FakeChatServer]:
    with FakeChatServer() as fake:
        yield fake


class Chat:
    """A browser window with the page, and a user's actions."""

    def __init__(self, context: Any, server: Any, expected_errors: list[str]) -> None:
        self.context, self.server, self.expected_errors = context, server, expected_errors
        self.requests: list[str] = []
        self.complaints: list[str] = []
        self.page = self.new_tab()

    def new_tab(self) -> Any:
        page = self.context.new_page()
        page.set_default_timeout(TIMEOUT_MS)
        page.on("request", lambda request: self.requests.append(request.url))
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.on("console", self._on_console)
        page.on("dialog", lambda dialog: (self.complaints.append(f"a dialog: {dialog.message}"), dialog.dismiss()))
        page.goto(self.server.url)
        page.wait_for_function(READY)
        return page

    def reload(self) -> None:
        """Reloads the page, and waits until it accepts input."""
        self.page.reload()
        self.page.wait_for_function(READY)

    def _on_console(self, message: Any) -> None:
        if message.type in ("error", "warning") and not any(word in message.text for word in self.expected_errors):
            self.complaints.append(message.text)

    def send(self, text: str) -> None:
        self.page.fill("#message", text)
        self.page.press("#message", "Enter")

    def wait_done(self, answers: int = 1) -> None:
        """Waits until there are this many answers and none is being generated."""
        self.page.wait_for_function(
            "n => document.querySelectorAll('.assistant[aria-busy=false]').length === n"
            " && !document.querySelector('[aria-busy=true]')",
            arg=answers,
        )

    def wait_text(self, text: str, where: str = "#thread") -> None:
        """Waits until the text is shown in an element."""
        self.page.wait_for_function(
            "([where, text]) => [...document.querySelectorAll(where)].some((node) => node.innerText.includes(text))",
            arg=[where, text],
        )

    def ask(self, text: str, answers: int = 1) -> None:
        self.send(text)
        self.wait_done(answers)

    def answer(self, index: int = -1) -> str:
        texts: list[str] = self.page.locator(".assistant > .markdown").all_inner_texts()
        return texts[index]

    def titles(self) -> list[str]:
        titles: list[str] = self.page.locator(".conversation-title").all_inner_texts()
        return titles

    def messages(self) -> list[dict[str, str]]:
        """The messages of the last request."""
        messages: list[dict[str, str]] = self.server.bodies[-1]["messages"]
        return messages


@pytest.fixture
def open_chat(browser: Any, server: FakeChatServer) -> Iterator[Callable[..., Chat]]:
    """Opens the page: `open_chat(["401"], locale="zh-CN", ...)`.

    The list contains console errors that the test provokes, `live` is another server to open the page from (any object with a
    `url`), the rest are Playwright's options of a context.
    """
    chats: list[Chat] = []

    def open_(expected_errors: list[str] | None = None, live: Any = None, **options: Any) -> Chat:
        context = browser.new_context(**{"viewport": {"width": 1200, "height": 800}, "locale": "en-US", **options})
        chat = Chat(context, live or server, expected_errors or [])
        chats.append(chat)
        return chat

    yield open_
    try:
        for chat in chats:
            assert chat.complaints == []
            own = (chat.server.url + "/", f"blob:{chat.server.url}/")
            assert [url for url in chat.requests if not url.startswith(own)] == []
    finally:
        for chat in chats:
            chat.context.close()


@pytest.fixture
def chat(open_chat: Callable[..., Chat]) -> Chat:
    return open_chat()
