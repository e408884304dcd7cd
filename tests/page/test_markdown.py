"""The page's Markdown renderer, run where it runs: what it makes of a text, whole and in pieces, and of hostile ones."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from support.fake_chat_server import FakeChatServer

# Renders each text whole; returns the HTML of the result (reading it is safe; nothing here writes HTML).
RENDER = """async (texts) => {
  const { MarkdownStream } = await import('/page/markdown_stream.js');
  return texts.map((text) => {
    const root = document.createElement('div');
    const stream = new MarkdownStream(root);
    stream.append(text);
    stream.render(false);
    return root.innerHTML;
  });
}"""
# Renders each list of pieces as a stream does, after each piece.
STREAM = """async (texts) => {
  const { MarkdownStream } = await import('/page/markdown_stream.js');
  return texts.map((pieces) => {
    const root = document.createElement('div');
    const stream = new MarkdownStream(root);
    const states = pieces.map((piece) => {
      stream.append(piece);
      stream.render(true);
      return root.innerHTML;
    });
    stream.render(false);
    return { html: root.innerHTML, states, rendered: stream.rendered };
  });
}"""


@pytest.fixture(scope="module")
def page(browser: Any) -> Iterator[Any]:
    """The chat page with nothing in it, for its modules: no test of this file changes it."""
    with FakeChatServer() as server:
        page = browser.new_page(locale="en-US")
        page.goto(server.url)
        yield page
        page.close()


@pytest.fixture
def stream(page: Any) -> Callable[[list[str]], dict[str, Any]]:
    return lambda pieces: page.evaluate(STREAM, [pieces])[0]


LINK = 'target="_blank" rel="noopener noreferrer" title="{0}" referrerpolicy="no-referrer"'

CASES = {
    "heading": ("# One\n### Three ##", '<h3 class="level-1" dir="auto">One</h3><h5 class="level-3" dir="auto">Three</h5>'),
    "underlined heading": ("One\n===", '<h3 class="level-1" dir="auto">One</h3>'),
    "rule under a paragraph": ("a\n---\nb", '<p dir="auto">a</p><hr><p dir="auto">b</p>'),
    "line break": ("a\nb", '<p dir="auto">a<br>b</p>'),
    "emphasis": ("*a* **b** ***c*** ~~d~~", "<p><em>a</em> <strong>b</strong> <em><strong>c</strong></em> <del>d</del></p>"),
    "nested emphasis": ("**a *b* c**", "<p><strong>a <em>b</em> c</strong></p>"),
    "no emphasis": ("2 * 3 * 4 snake_case_name ~5", "<p>2 * 3 * 4 snake_case_name ~5</p>"),
    "emphasis beside Chinese": ("**注意：**请看*“这里”*吧", "<p><strong>注意：</strong>请看<em>“这里”</em>吧</p>"),
    "code span": ("`a < b` and ``a ` b``", '<p><code translate="no">a &lt; b</code> and <code translate="no">a ` b</code></p>'),
    "escapes": (r"\*a\* \# \\", "<p>*a* # \\</p>"),
    "entities": ("&lt;b&gt; &amp; &#65; &nosuch;", "<p>&lt;b&gt; &amp; A &amp;nosuch;</p>"),
    "html is text": ("<b>a</b>\n\n<div onclick=x>", "<p>&lt;b&gt;a&lt;/b&gt;</p><p>&lt;div onclick=x&gt;</p>"),
    "break tag": ("a<br>b", "<p>a<br>b</p>"),
    "math": (r"\(a_1 * b_2 * c\)", '<p><span class="math" translate="no">a_1 * b_2 * c</span></p>'),
    "display math": ("\\[\n- a\n\\]\nb", '<div class="math" tabindex="0" translate="no">- a</div><p>b</p>'),
    "list": ("- a\n- b\n  - c", "<ul><li>a</li><li>b<ul><li>c</li></ul></li></ul>"),
    "list in list by two spaces": ("1. a\n  - b\n2. c", "<ol><li>a<ul><li>b</li></ul></li><li>c</li></ol>"),
    "list that starts later": ("3. a\n4. b", '<ol start="3"><li>a</li><li>b</li></ol>'),
    "loose list": ("- a\n\n- b", "<ul><li><p>a</p></li><li><p>b</p></li></ul>"),
    "lazy line": ("- a\nb", "<ul><li>a<br>b</li></ul>"),
    "list ends": ("- a\n\nb", "<ul><li>a</li></ul><p>b</p>"),
    "quote": ("> a\n> > b", "<blockquote><p>a</p><blockquote><p>b</p></blockquote></blockquote>"),
    "table": (
        "| a | b |\n|:-:|--:|\n| 1 | `x\\|y` |\n| 2 |",
        '<div class="table" tabindex="0" role="group" aria-label="Table"><table><thead><tr>'
        '<th class="to-center" scope="col">a</th>'
        '<th class="to-right" scope="col">b</th></tr></thead><tbody><tr><td class="to-center">1</td><td class="to-right">'
        '<code translate="no">x|y</code></td></tr><tr><td class="to-center">2</td></tr></tbody></table></div>',
    ),
    "link": (
        '[docs](https://example.com/a "title")',
        f'<p><a href="https://example.com/a" {LINK.format("https://example.com/a")}>docs</a>'
        '<bdi class="target" dir="ltr"> (example.com)</bdi></p>',
    ),
    "bare link": (
        "(see https://example.com/a_b.)",
        f'<p>(see <a href="https://example.com/a_b" {LINK.format("https://example.com/a_b")}>https://example.com/a_b</a>.)</p>',
    ),
    "link in Chinese": (
        "见https://example.com。",
        f'<p>见<a href="https://example.com/" {LINK.format("https://example.com/")}>https://example.com</a>。</p>',
    ),
}


def test_what_it_makes_of_markdown(page: Any) -> None:
    found = page.evaluate(RENDER, [text for text, _ in CASES.values()])
    plain = [
        html if 'dir="auto"' in expected else html.replace(' dir="auto"', "")
        for html, (_, expected) in zip(found, CASES.values(), strict=True)
    ]
    assert dict(zip(CASES, plain, strict=True)) == {name: expected for name, (_, expected) in CASES.items()}


def test_code_block_has_its_language_and_its_text_as_it_is(page: Any) -> None:
    html = page.evaluate(RENDER, ["```python hl\n  if a < b:\n\n    *x*\n```\nafter"])[0]
    assert '<span class="code-language">python</span>' in html
    assert '<code translate="no">  if a &lt; b:\n\n    *x*</code>' in html
    assert html.endswith('<p dir="auto">after</p>')


UNFINISHED = {
    "a **bol": "a bol",
    "a **bold** and **": "a bold and",
    "a `co": "a co",
    "see [docs](https://exam": "see docs",
    "- a\n- **b": "ab",
    "| a | b |\n|--|--|\n| **c": "abc",
}


def test_marks_that_are_still_open_do_not_show(page: Any) -> None:
    script = """async (texts) => {
      const { MarkdownStream } = await import('/page/markdown_stream.js');
      return texts.map((text) => {
        const root = document.createElement('div');
        const stream = new MarkdownStream(root);
        stream.append(text);
        stream.render(true);
        return root.textContent.trim();
      });
    }"""
    assert dict(zip(UNFINISHED, page.evaluate(script, list(UNFINISHED)), strict=True)) == UNFINISHED


PARTS = [
    "# h", "a", "b c", "**", "*", "_", "`", "```", "~~~", "```py", "- ", "  - ", "1. ", "> ", "|", "|-|-|", "---", "===", "\n",
    "\n\n", "    ", "\t", "[", "](", ")", "![", "<b>", "<img src=x onerror=alert(1)>", "<script>alert(1)</script>", "\\",
    "https://e.org/", "javascript:", "[x](javascript:alert(1))", "[x](https://e.org)", "![x](http://e.org/i.png)", "\\(", "\\)",
    "\\[", "\\]", "$$", "&lt;", "&#x3c;", "~~", "中文。", "\u202e", "\r\n", "\r", "\0", "| a | b |\n|---|---|\n| c | d |\n",
    "- [x] t", "😀",
]  # fmt: skip


def random_markdown(seed: int, parts: int) -> str:
    choose = random.Random(seed)
    return "".join(choose.choice(PARTS) for _ in range(parts))


def cut(text: str, seed: int) -> list[str]:
    """The text in pieces of a few characters."""
    choose = random.Random(seed)
    pieces = []
    while text:
        size = choose.randint(1, 9)
        pieces.append(text[:size])
        text = text[size:]
    return pieces


def test_a_stream_ends_up_as_the_whole_text_does(page: Any) -> None:
    texts = [random_markdown(seed, 60) for seed in range(150)]
    whole = page.evaluate(RENDER, texts)
    streamed = page.evaluate(STREAM, [cut(text, seed) for seed, text in enumerate(texts)])
    for text, expected, found in zip(texts, whole, streamed, strict=True):
        assert found["html"] == expected, text


# Element -> the attributes it may have. Whatever a text holds, nothing else may come of it.
ALLOWED = {
    **{tag: ["dir", "class"] for tag in ["P", "H3", "H4", "H5", "H6"]},
    **{tag: [] for tag in ["BR", "HR", "EM", "STRONG", "DEL", "BLOCKQUOTE", "UL", "TABLE", "THEAD", "TBODY", "TR"]},
    "OL": ["start"],
    "LI": ["dir", "class"],
    "INPUT": ["type", "disabled", "checked", "aria-label"],
    "CODE": ["translate"],
    "PRE": ["tabindex", "role", "aria-label"],
    "DIV": ["class", "dir", "tabindex", "role", "aria-label", "translate"],
    "SPAN": ["class", "translate"],
    "BDI": ["class", "dir"],
    "A": ["href", "target", "rel", "title", "referrerpolicy"],
    "TH": ["class", "scope", "dir"],
    "TD": ["class", "dir"],
    "BUTTON": ["class", "type", "aria-label"],
    "svg": ["class", "aria-hidden"],
    "use": ["href"],
}
FORBIDDEN = """async ([texts, allowed]) => {
  const { MarkdownStream } = await import('/page/markdown_stream.js');
  const bad = [];
  for (const text of texts) {
    const root = document.createElement('div');
    const stream = new MarkdownStream(root);
    stream.append(text);
    stream.render(false);
    for (const node of root.querySelectorAll('*')) {
      const names = Object.hasOwn(allowed, node.tagName) ? allowed[node.tagName] : null;
      const wrong = names === null || [...node.attributes].some((one) => !names.includes(one.name));
      const link = node.tagName === 'A' && !['http:', 'https:', 'mailto:'].includes(node.protocol);
      if (wrong || link) bad.push([text, node.outerHTML]);
    }
  }
  return bad;
}"""


def test_nothing_but_the_allowed_elements_comes_of_any_text(page: Any) -> None:
    texts = [random_markdown(seed, 40) for seed in range(1000, 1400)]
    assert page.evaluate(FORBIDDEN, [texts, ALLOWED]) == []
    assert page.evaluate(FORBIDDEN, [["a"], {}]) != []  # the check can fail


HOSTILE = {
    "words": "some words and **bold** ones, `code` and [a](https://e.org)\n\n",
    "stars": "*a ",
    "closing stars": "*a* b* ",
    "mixed": "*_**__a",
    "ticks": "`",
    "ticks of all sizes": None,
    "brackets": "[",
    "closing brackets": "[a]",
    "links cut short": "[a](b",
    "links with quotes": '[a](b "c',
    "images in images": "![",
    "angles": "<http://a",
    "quotes": "> ",
    "lists": "- ",
    "numbers": "1. ",
    "tables": "|a|b|\n|-|-|\n",
    "pipes": "|",
    "urls": "http://)))))",
    "math": "\\(a$$",
    "entities": "&#x41;&amp",
    "hashes": "# # ",
    "lines": "a\n",
    "spaces": "a  ",
    "fences": "```a\n",
    "deep items": None,
}


def hostile(name: str, size: int) -> str:
    unit = HOSTILE[name]
    if name == "ticks of all sizes":
        text = "".join("`" * n + " " for n in range(1, int((2 * size) ** 0.5)))
        return text[:size]
    if name == "deep items":
        return "".join(" " * (2 * (n % 40)) + "- a\n" for n in range(size // 44))
    assert unit is not None
    return (unit * (size // len(unit) + 1))[:size]


PARSE_TIMES = """async (texts) => {
  const { parseBlocks } = await import('/page/markdown_blocks.js');
  const { parseInline } = await import('/page/markdown_inline.js');
  return texts.map((text) => {
    const from = performance.now();
    const blocks = parseBlocks(text.split('\\n'));
    for (const block of blocks) if (block.text) parseInline(block.text);
    parseInline(text);
    return performance.now() - from;
  });
}"""


def is_linear(page: Any, name: str) -> bool:
    """Four times the text takes about four times as long; quadratic work would take sixteen. Loose: the machine is shared.

    Short texts come first, so that work that is not linear shows before it takes minutes.
    """
    for size in (30_000, 250_000):
        for _ in range(3):  # what was only disturbed passes another time
            small, large = page.evaluate(PARSE_TIMES, [hostile(name, size), hostile(name, 4 * size)])
            if large < 10 * small + 100:
                break
        else:
            return False
    return True


def test_hostile_text_takes_linear_time(page: Any) -> None:
    for name in HOSTILE:
        assert is_linear(page, name), name


def test_a_long_answer_is_not_rendered_again_at_each_piece(stream: Callable[[list[str]], dict[str, Any]]) -> None:
    pieces = [f"word{n} " if n % 20 else "\n\n" for n in range(1, 2000)]
    done = stream(pieces)
    assert done["html"].count("<p") == 100
    assert done["rendered"] < 2 * len(pieces)  # one block a piece, and never all of them


def test_code_that_grows_only_gets_more_text(stream: Callable[[list[str]], dict[str, Any]]) -> None:
    done = stream(["```py\n", *("x = 1\n" for _ in range(500)), "```\n"])
    assert done["html"].count("x = 1") == 500
    assert done["rendered"] == 1
