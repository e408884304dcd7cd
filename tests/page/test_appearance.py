"""Appearance and accessibility: light and dark, small screens, keyboard only, Chinese, input methods, screen readers."""

from __future__ import annotations

import re
from collections.abc import Callable
from threading import Event
from typing import Any

import pytest

from support.fake_chat_server import FakeChatServer, Reply, Thought, error_body, page_folder

BACKGROUND = "getComputedStyle(document.body).backgroundColor"
LIGHT, DARK = "rgb(255, 255, 255)", "rgb(23, 25, 29)"
# Visible elements whose text has too little contrast (WCAG AA: 4.5 to 1 against the background).
FAINT = """() => {
  const parse = (color) => (color.match(/[\\d.]+/g) ?? [0, 0, 0, 0]).map(Number);
  const linear = (c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
  const light = ([r, g, b]) => 0.2126 * linear(r / 255) + 0.7152 * linear(g / 255) + 0.0722 * linear(b / 255);
  const behind = (node) => {
    for (let one = node; one; one = one.parentElement) {
      const color = parse(getComputedStyle(one).backgroundColor);
      if (color.length < 4 || color[3] === 1) return color;
    }
    return [255, 255, 255];
  };
  const seen = [];
  for (const node of document.querySelectorAll('body *')) {
    const text = [...node.childNodes].some((one) => one.nodeType === 3 && one.data.trim());
    if (!text || !node.checkVisibility({ opacityProperty: true, visibilityProperty: true }) || node.disabled) continue;
    const [a, b] = [light(parse(getComputedStyle(node).color)), light(behind(node))].sort((x, y) => y - x);
    if ((a + 0.05) / (b + 0.05) < 4.5) seen.push([node.textContent, (a + 0.05) / (b + 0.05)]);
  }
  return seen;
}"""
SMALL_TARGETS = """() => [...document.querySelectorAll('button, select, summary, input:not([type=checkbox])')]
  .filter((node) => node.checkVisibility())
  .map((node) => [node.id || node.className || node.tagName, node.getBoundingClientRect()])
  .filter(([, box]) => box.width < 43.5 || box.height < 43.5)
  .map(([name]) => name)"""
UNNAMED = """() => [...document.querySelectorAll('button, select, input, textarea, [role=meter], dialog, aside, nav')]
  .filter((node) => !node.getAttribute('aria-label') && !node.getAttribute('aria-labelledby') && !node.labels?.length
    && !node.textContent.trim())
  .map((node) => node.outerHTML)"""
CODE = """# a comment
@decorate
class Name(Base):
    def method(self, number: int = 1) -> str:
        return f"text {number}" if number else None
"""
MARKUP = '<p class="a">text &amp; more</p>\n<!-- remark -->'
EVERYTHING = f"""# Title

Text `code` [link](https://e.org) $x^2$ $\\nosuch$ note[^1]

> quote

```py
{CODE}```

```html
{MARKUP}
```

```diff
+ added
- removed
```

| a | b |
|---|---|
| c | d |

[^1]: Note.
"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_system_selects_the_theme_and_contrast_is_sufficient(
    open_chat: Callable[..., Any], server: FakeChatServer, scheme: str
) -> None:
    chat = open_chat(["Failed to load resource"], color_scheme=scheme)
    assert chat.page.evaluate(BACKGROUND) == (LIGHT if scheme == "light" else DARK)
    assert chat.page.evaluate(FAINT) == []
    server.replies += [Reply([Thought("hm"), EVERYTHING]), Reply(status=400, error=error_body("no"))]
    chat.ask("Hi")
    chat.page.click(".thinking summary")
    chat.ask("more", answers=2)
    chat.page.fill("#search", "title")
    chat.page.wait_for_selector("mark")
    assert chat.page.locator("[class^=hl-]").count() > 10 and chat.page.locator("math").count() == 1
    assert chat.page.evaluate(FAINT) == []
    for button in ["#settings", "#key", "#shortcuts"]:
        chat.page.click(button)
        assert chat.page.evaluate(FAINT) == []
        chat.page.keyboard.press("Escape")


def test_the_user_selects_the_theme_and_it_is_saved(open_chat: Callable[..., Any]) -> None:
    chat = open_chat(color_scheme="dark")
    for expected in [LIGHT, DARK, DARK, LIGHT]:  # light, dark, system, light
        chat.page.click("#theme")
        assert chat.page.evaluate(BACKGROUND) == expected
    chat.reload()
    assert chat.page.evaluate(BACKGROUND) == LIGHT


def test_on_a_phone(open_chat: Callable[..., Any], server: FakeChatServer) -> None:
    chat = open_chat(viewport={"width": 360, "height": 640}, has_touch=True, is_mobile=True)
    long = "https://e.org/" + "a" * 300
    wide = (
        "| " + " | ".join(["a wide column"] * 12) + " |\n|" + "---|" * 12 + f"\n\n```\n{'x' * 300}\n```\n\n{long} `{'y' * 200}`"
    )
    server.replies.append(Reply([wide]))
    chat.page.fill("#message", "w" * 300)
    chat.page.press("#message", "Enter")  # no Shift key there: a new line
    assert chat.page.input_value("#message").endswith("w\n")
    chat.page.tap("#send")
    chat.wait_done()
    assert chat.page.evaluate("document.documentElement.scrollWidth") == 360
    assert chat.page.evaluate(
        "document.getElementById('scroller').scrollWidth <= document.getElementById('scroller').clientWidth"
    )
    assert chat.page.evaluate(SMALL_TARGETS) == []

    assert not chat.page.locator("#sidebar").is_visible()
    chat.page.tap("#open-sidebar")
    assert chat.page.locator("#sidebar").is_visible()
    assert chat.page.evaluate("document.getElementById('main').inert")
    assert chat.page.evaluate(SMALL_TARGETS) == []
    chat.page.tap("#new-chat")
    assert not chat.page.locator("#sidebar").is_visible()
    chat.page.tap("#open-sidebar")
    chat.page.touchscreen.tap(350, 300)  # outside of it
    assert not chat.page.locator("#sidebar").is_visible()
    chat.page.tap("#settings")
    assert chat.page.evaluate(SMALL_TARGETS) == []
    box = chat.page.locator("#settings-dialog").bounding_box()
    assert box["x"] >= 0 and box["x"] + box["width"] <= 360


def test_with_the_keyboard_alone(chat: Any, server: FakeChatServer) -> None:
    keys = chat.page.keyboard
    focused = "document.activeElement.id || document.activeElement.className"
    assert chat.page.evaluate(focused) == "message"  # the message box has the focus
    keys.type("one")
    keys.press("Shift+Enter")
    keys.type("two")
    keys.press("Enter")
    chat.wait_done()
    assert chat.messages() == [{"role": "user", "content": "one\ntwo"}]
    assert chat.page.evaluate(focused) == "message"

    keys.press("ArrowUp")  # from an empty box: edits the last message
    keys.press("End")
    keys.type("!")
    keys.press("Enter")
    chat.wait_text("two!", ".assistant")
    chat.wait_done()
    assert chat.messages()[-1]["content"] == "one\ntwo!"

    server.replies.append(Reply(["slow", Event()]))
    keys.type("more")
    keys.press("Enter")
    chat.wait_text("slow", ".assistant")
    keys.press("Enter")  # sends nothing during an answer
    keys.press("Escape")
    chat.wait_text("You stopped this answer")
    chat.wait_done(2)

    keys.press("Control+/")
    assert chat.page.locator("#shortcuts-dialog").is_visible()
    keys.press("Escape")
    keys.press("Control+,")
    assert chat.page.locator("#settings-dialog").is_visible()
    keys.press("Escape")
    keys.press("Control+Shift+S")
    assert not chat.page.locator("#sidebar").is_visible()
    keys.press("Control+Shift+S")
    assert chat.page.locator("#sidebar").is_visible()
    keys.press("Shift+Escape")
    assert chat.page.evaluate(focused) == "message"
    keys.press("Control+Shift+O")
    assert chat.page.locator(".message").count() == 0

    # Tab reaches everything in the order of the page, and the focus is visible.
    chat.page.focus(".skip")
    order = ["skip"]
    while "message" not in order and len(order) < 30:
        keys.press("Tab")
        order.append(chat.page.evaluate(focused))
        outline = chat.page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
        assert outline == "solid" or order[-1] in ("message", "search")  # the outline of these boxes is on their container
    ids = [
        "skip",
        "close-sidebar",
        "new-chat",
        "search",
        "conversation",
        "icon-button",
        "import",
        "export-all",
        "theme",
        "language",
        "key",
        "shortcuts",
        "settings",
    ]
    places = [order.index(name) for name in [*ids, "scroller", "message"]]
    assert places == sorted(places)


@pytest.mark.every_run
def test_every_control_has_a_name(chat: Any) -> None:
    chat.ask("Hi")
    chat.page.click("#settings")
    assert chat.page.evaluate(UNNAMED) == []


def test_a_screen_reader_announces_the_answer_once(chat: Any, server: FakeChatServer) -> None:
    heard = "window.heard = []; new MutationObserver(() => window.heard.push(document.getElementById('announcer').textContent))"
    chat.page.evaluate(
        f"() => {{ {heard}.observe(document.getElementById('announcer'), {{ childList: true, subtree: true }}); }}"
    )
    server.replies.append(Reply(["some ", "words ", "come"]))
    chat.ask("Hi")
    chat.wait_text("Answer complete: some words come", "#announcer")
    said = {text for text in chat.page.evaluate("window.heard") if text}
    assert said <= {"Answer begins", "Answer complete: some words come"}
    assert chat.page.evaluate("document.querySelectorAll('[aria-live]').length") == 1


def test_in_chinese(open_chat: Callable[..., Any], server: FakeChatServer) -> None:
    chat = open_chat(["Failed to load resource"], locale="zh-CN")
    assert chat.page.evaluate("document.documentElement.lang") == "zh-CN"
    assert chat.page.title() == "对话 · deepseek-optimizer"
    chat.wait_text("想聊点什么？")
    server.replies.append(Reply([Thought("想"), "**你好：**世界"]))
    chat.ask("你好")
    assert chat.page.inner_text(".assistant strong") == "你好："
    chat.wait_text("思考了", "summary")
    known = "deepseek-optimizer|tiny|token|Enter|Shift|English|EN|API"
    letters = f"document.body.innerText.replace(/{known}/g, '').match(/[A-Za-z]+/g)"
    assert chat.page.evaluate(letters) is None
    chat.page.click("#language")
    chat.wait_text("Thought for", "summary")
    chat.reload()
    chat.wait_text("Thought", "summary")
    assert chat.page.evaluate("document.documentElement.lang") == "en"


def test_both_languages_have_the_same_strings(chat: Any) -> None:
    strings = chat.page.evaluate("async () => (await import('/page/strings.js')).STRINGS")
    assert set(strings) == {"en", "zh"}
    assert set(strings["en"]) == set(strings["zh"])
    for key, text in strings["en"].items():
        assert text and strings["zh"][key], key
        assert set(re.findall(r"\{\w+\}", text)) == set(re.findall(r"\{\w+\}", strings["zh"][key])), key
    files = [file for file in page_folder().iterdir() if file.is_file() and file.name != "strings.js"]
    used = "".join(file.read_text(encoding="utf-8") for file in files)
    # Some keys are composed: theme*, error<status>, <field>Hint, titles of errors.
    unused = [
        key for key in strings["en"] if not re.search(rf"['\"]{key}['\"]", used) and not re.match(r"theme|error|\w+Hint$", key)
    ]
    assert unused == []


def test_enter_that_ends_a_composition_does_not_send(chat: Any, server: FakeChatServer) -> None:
    session = chat.context.new_cdp_session(chat.page)
    chat.page.focus("#message")
    session.send("Input.imeSetComposition", {"text": "ni", "selectionStart": 2, "selectionEnd": 2})
    press = """({ isComposing, keyCode }) => {
      const event = new KeyboardEvent('keydown', { key: 'Enter', isComposing, keyCode, bubbles: true, cancelable: true });
      document.getElementById('message').dispatchEvent(event);
      return event.defaultPrevented;
    }"""
    assert chat.page.evaluate(press, {"isComposing": True, "keyCode": 13}) is False
    assert chat.page.evaluate(press, {"isComposing": False, "keyCode": 229}) is False  # Safari, after the composition
    session.send("Input.insertText", {"text": "你"})
    assert server.bodies == []
    assert chat.page.input_value("#message") == "你"
    assert chat.page.evaluate(press, {"isComposing": False, "keyCode": 13}) is True
    chat.wait_text("You said: 你")


def test_reduced_motion_is_respected(open_chat: Callable[..., Any], server: FakeChatServer) -> None:
    moving = "getComputedStyle(document.querySelector('.waiting span')).animationName"
    for wish, expected in [("no-preference", "breathe"), ("reduce", "none")]:
        chat = open_chat(reduced_motion=wish)
        server.replies.append(Reply([Event()]))
        chat.send("Hi")
        chat.page.wait_for_selector(".waiting", state="visible")
        assert chat.page.evaluate(moving) == expected
        chat.page.keyboard.press("Escape")
        chat.wait_done()


def test_footnotes_are_reachable_by_keyboard(chat: Any, server: FakeChatServer) -> None:
    server.replies.append(Reply(["one[^a]\n\n" + "text\n\n" * 60 + "[^a]: The note."]))
    chat.ask("Hi")
    chat.page.focus(".footnote-ref")
    chat.page.keyboard.press("Enter")
    assert chat.page.evaluate("document.activeElement.innerText").split() == ["1.", "The", "note."]
    assert chat.page.locator(".footnote").is_visible()
    assert "#" in chat.page.url and chat.titles() == ["Hi"]  # the URL still has the conversation
