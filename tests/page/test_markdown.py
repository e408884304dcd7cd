"""The page's Markdown renderer, in the browser: its output for whole texts, streamed texts, and malicious texts."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from support.fake_chat_server import FakeChatServer

STREAM_MAKER = """() => {
  window.makeStream = async () => {
    const { streamMaker } = await import('/page/markdown_stream.js');
    const { loadLibraries } = await import('/page/libraries.js');
    return (window.streams ??= streamMaker(await loadLibraries()));
  };
}"""
# Renders each text whole; returns the resulting HTML (reading it is safe; nothing here writes HTML).
RENDER = """async (texts) => {
  const makeStream = await window.makeStream();
  return texts.map((text) => {
    const root = document.createElement('div');
    const stream = makeStream(root);
    stream.append(text);
    stream.render(false);
    return root.innerHTML;
  });
}"""
# Renders each list of chunks like a stream, after each chunk.
STREAM = """async ([texts, keepStates]) => {
  const makeStream = await window.makeStream();
  return texts.map((pieces) => {
    const root = document.createElement('div');
    const stream = makeStream(root);
    const states = pieces.map((piece) => {
      stream.append(piece);
      stream.render(true);
      return keepStates && root.innerHTML;
    });
    stream.render(false);
    return { html: root.innerHTML, states, rendered: stream.rendered, blocks: root.childElementCount };
  });
}"""


@pytest.fixture(scope="module")
def page(browser: Any) -> Iterator[Any]:
    """An empty chat page, for its modules; no test of this file changes it."""
    with FakeChatServer() as server:
        page = browser.new_page(locale="en-US")
        page.goto(server.url)
        page.evaluate(STREAM_MAKER)
        yield page
        page.close()


@pytest.fixture
def stream(page: Any) -> Callable[..., dict[str, Any]]:
    return lambda pieces, states=True: page.evaluate(STREAM, [[pieces], states])[0]


LINK = 'target="_blank" rel="noopener noreferrer" title="{0}" referrerpolicy="no-referrer"'

DISPLAY = ' display="block"'
A_1 = "<math{}><semantics><mrow><msub><mi>a</mi><mn>1</mn></msub></mrow></semantics></math>"
CASES = {
    "heading": ("# One\n### Three ##", '<h3 class="level-1" dir="auto">One</h3><h5 class="level-3" dir="auto">Three</h5>'),
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
    "math": (r"\(a_1\)", f'<p><span class="math" translate="no">{A_1.format("")}</span></p>'),
    "math in dollars": ("$a_1$, $5 and $10", f'<p><span class="math" translate="no">{A_1.format("")}</span>, $5 and $10</p>'),
    "display math": (
        "\\[\na_1\n\\]\nb",
        f'<div class="math" translate="no" tabindex="0">{A_1.format(DISPLAY)}</div><p>b</p>',
    ),
    "math that is none": (r"\(\nosuch\)", r'<p><span class="math source" translate="no">\nosuch</span></p>'),
    "footnote": (
        "a[^x] b[^y]\n\n[^x]: note",
        '<p>a<sup><button class="footnote-ref" type="button" aria-label="Footnote 1">1</button></sup> b[^y]</p>'
        '<div class="footnote" tabindex="-1" data-footnote="1"><span class="footnote-number">1.</span>'
        '<div class="footnote-text"><p>note</p></div></div>',
    ),
    "tasks": (
        "- [x] a\n- [ ] b",
        '<ul><li class="task"><input type="checkbox" disabled="" checked="" aria-label="done">a</li>'
        '<li class="task"><input type="checkbox" disabled="" aria-label="to do">b</li></ul>',
    ),
    "list": ("- a\n- b\n  - c", "<ul><li>a</li><li>b<ul><li>c</li></ul></li></ul>"),
    "list in list": ("1. a\n   - b\n2. c", "<ol><li>a<ul><li>b</li></ul></li><li>c</li></ol>"),
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
        '<code translate="no">x|y</code></td></tr><tr><td class="to-center">2</td>'
        '<td class="to-right"></td></tr></tbody></table></div>',
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


def test_rendering_of_markdown(page: Any) -> None:
    actual = page.evaluate(RENDER, [text for text, _ in CASES.values()])
    plain = [
        html if 'dir="auto"' in expected else html.replace(' dir="auto"', "")
        for html, (_, expected) in zip(actual, CASES.values(), strict=True)
    ]
    assert dict(zip(CASES, plain, strict=True)) == {name: expected for name, (_, expected) in CASES.items()}


def test_code_blocks_have_language_highlighting_and_verbatim_text(page: Any) -> None:
    known, unknown = page.evaluate(RENDER, ["```python hl\n  if a < b:\n\n    *x*\n```\nafter", "```nosuch\nif a < b\n```"])
    assert '<span class="code-language">python</span>' in known
    assert '<code translate="no">  <span class="hl-keyword">if</span> a &lt; b:\n\n    *x*</code>' in known
    assert known.endswith('<p dir="auto">after</p>')
    assert '<code translate="no">if a &lt; b</code>' in unknown


UNFINISHED = {
    "a **bol": "a bol",
    "a **bold** and **": "a bold and",
    "a `co": "a co",
    "see [docs](https://exam": "see docs",
    "- a\n- **b": "ab",
    "| a | b |\n|--|--|\n| **c": "abc",
}


def test_unclosed_marks_are_hidden_while_streaming(page: Any) -> None:
    script = """async (texts) => {
      const makeStream = await window.makeStream();
      return texts.map((text) => {
        const root = document.createElement('div');
        const stream = makeStream(root);
        stream.append(text);
        stream.render(true);
        return root.textContent.trim();
      });
    }"""
    assert dict(zip(UNFINISHED, page.evaluate(script, list(UNFINISHED)), strict=True)) == UNFINISHED


TEX = [
    r"$\href{javascript:alert(1)}{x}$ $\url{javascript:alert(1)}$ $\includegraphics{https://evil.example/a.png}$",
    r"$\htmlStyle{background: url(https://evil.example)}{x}$ $\htmlData{a=b}{x}$ $\htmlId{main}{x}$ $\htmlClass{a}{x}$",
    r"$\color{url(https://evil.example)}x$ $\textcolor{red}{x}$ $\colorbox{#abc}{x}$ $\fcolorbox{red}{blue}{x}$",
    r"$\text{<img src=x onerror=alert(1)>}$ $\unicode{x3c}$ $\def\a{\a\a}\a$ $\mathbb{R} \mathcal{L} \mathfrak{g} \mathbf{x}$",
    "$$\\begin{pmatrix} a & b \\\\ c & d \\end{pmatrix} \\tag{1}$$",
    "$$" + "{" * 3000 + "}" * 3000 + "$$",
]
PARTS = [
    "# h", "a", "b c", "**", "*", "_", "`", "```", "~~~", "```py", "- ", "  - ", "1. ", "> ", "|", "|-|-|", "---", "===", "\n",
    "\n\n", "    ", "\t", "[", "](", ")", "![", "<b>", "<img src=x onerror=alert(1)>", "<script>alert(1)</script>", "\\",
    "https://e.org/", "javascript:", "[x](javascript:alert(1))", "[x](https://e.org)", "![x](http://e.org/i.png)", "\\(", "\\)",
    "\\[", "\\]", "$$", "&lt;", "&#x3c;", "~~", "中文。", "\u202e", "\r\n", "\r", "\0", "| a | b |\n|---|---|\n| c | d |\n",
    "- [x] t", "😀", "$", "$x^2$", "\\frac", "{", "}", "[^1]", "\n[^1]: ", "  ",
]  # fmt: skip


def random_markdown(seed: int, parts: int) -> str:
    choose = random.Random(seed)
    return "".join(choose.choice(PARTS) for _ in range(parts))


def cut(text: str, seed: int, longest: int = 9) -> list[str]:
    """The text in chunks of a few characters."""
    choose = random.Random(seed)
    pieces = []
    while text:
        size = choose.randint(1, longest)
        pieces.append(text[:size])
        text = text[size:]
    return pieces


@pytest.mark.every_run
def test_a_stream_renders_like_the_whole_text(page: Any) -> None:
    texts = [random_markdown(seed, 60) for seed in range(150)]
    whole = page.evaluate(RENDER, texts)
    streamed = page.evaluate(STREAM, [[cut(text, seed) for seed, text in enumerate(texts)], False])
    for text, expected, actual in zip(texts, whole, streamed, strict=True):
        assert actual["html"] == expected, text


# Allowed element -> its allowed attributes. No text may produce anything else.
ALLOWED = {
    **{tag: ["dir", "class"] for tag in ["P", "H3", "H4", "H5", "H6"]},
    **{tag: [] for tag in ["BR", "HR", "EM", "STRONG", "DEL", "BLOCKQUOTE", "UL", "TABLE", "THEAD", "TBODY", "TR"]},
    "OL": ["start"],
    "LI": ["dir", "class"],
    "INPUT": ["type", "disabled", "checked", "aria-label"],
    "CODE": ["translate"],
    "PRE": ["tabindex", "role", "aria-label"],
    "DIV": ["class", "dir", "tabindex", "role", "aria-label", "translate", "data-footnote"],
    "SPAN": ["class", "translate"],
    "SUP": [],
    "BDI": ["class", "dir"],
    "A": ["href", "target", "rel", "title", "referrerpolicy"],
    "TH": ["class", "scope", "dir"],
    "TD": ["class", "dir"],
    "BUTTON": ["class", "type", "aria-label"],
    "svg": ["class", "aria-hidden"],
    "use": ["href"],
}
# Elements of formulas; math.js sets `style`: colors, alignment and gaps.
MATHML = (
    "display displaystyle scriptlevel mathvariant stretchy fence separator symmetric largeop movablelimits accent accentunder "
    "form minsize maxsize lspace rspace linethickness width height depth voffset columnalign columnspacing rowspacing "
    "columnlines rowlines notation style"
).split()
ALLOWED |= {
    tag: MATHML
    for tag in (
        "math mrow mi mn mo ms mtext mspace mfrac msqrt mroot msub msup msubsup munder mover munderover mtable mtr mtd mstyle "
        "mpadded mphantom menclose semantics"
    ).split()
}
FORBIDDEN = """async ([texts, allowed]) => {
  const makeStream = await window.makeStream();
  const bad = [];
  for (const text of texts) {
    const root = document.createElement('div');
    const stream = makeStream(root);
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


def test_any_text_gives_only_allowed_elements(page: Any) -> None:
    texts = [random_markdown(seed, 40) for seed in range(1000, 1400)] + TEX
    assert page.evaluate(FORBIDDEN, [texts, ALLOWED]) == []
    assert page.evaluate(FORBIDDEN, [["a"], {}]) != []  # proof that the check can fail


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
    "footnotes": "[^",
    "notes": "[^1]: a\n",
    "dollars": "$a ",
    "strikes": "~~a ",
    "rules": "---\n",
    "TeX": "$\\frac{",
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


RENDER_TIMES = """async (texts) => {
  const makeStream = await window.makeStream();
  return texts.map((text) => {
    const from = performance.now();
    const stream = makeStream(document.createElement('div'));
    stream.append(text);
    stream.render(true);
    return performance.now() - from;
  });
}"""


def is_linear(page: Any, name: str) -> bool:
    """Four times the text takes about four times as long; quadratic work would take sixteen. Tolerant of a busy machine.

    Short texts come first, so that work that is not linear is detected before it takes minutes.
    """
    for size in (2_500, 12_500):
        for _ in range(3):  # repeated, since other processes may disturb a measurement
            small, large = page.evaluate(RENDER_TIMES, [hostile(name, size), hostile(name, 4 * size)])
            if large < 10 * small + 200:
                break
        else:
            return False
    return True


def test_malicious_text_takes_linear_time(page: Any) -> None:
    for name in HOSTILE:
        assert is_linear(page, name), name


def test_depth_of_the_tree_is_limited(page: Any) -> None:
    script = """(html) => { let deepest = 0; const walk = (node, depth) => { deepest = Math.max(deepest, depth);
      for (const child of node.children) walk(child, depth + 1); }; const root = document.createElement('div');
      root.append(...html); walk(root, 0); return deepest; }"""
    depths = page.evaluate(
        f"""async (texts) => {{
          const makeStream = await window.makeStream();
          return texts.map((text) => {{
            const root = document.createElement('div');
            const stream = makeStream(root);
            stream.append(text);
            stream.render(false);
            return ({script})([root]);
          }});
        }}""",
        ["> " * 300, "- " * 300, "*a " * 2000 + "a* " * 2000, "[" * 500 + "](b)" * 500],
    )
    assert max(depths) < 70


def test_long_answers_are_rendered_incrementally(stream: Callable[..., dict[str, Any]]) -> None:
    section = "## Part\n\nSome *words*, $x^2$.\n\n- one\n- two\n\n```py\nx = 1\n```\n\n| a | b |\n|---|---|\n| c | d |\n\n"
    text = section * (50_000 // len(section))
    pieces = cut(text, 1, longest=200)
    done = stream(pieces, states=False)
    assert done["html"].count("<table") == 50_000 // len(section)
    assert done["rendered"] < done["blocks"] + 3 * len(pieces)  # never all of them again


def test_growing_code_only_appends_text(stream: Callable[..., dict[str, Any]]) -> None:
    done = stream(["```py\n", *("x = y\n" for _ in range(500)), "```\n"])
    assert done["html"].count("x = y") == 500
    assert done["rendered"] == 2  # while it streams, and highlighted once it is complete


def test_later_footnotes_become_links_in_earlier_blocks(stream: Callable[..., dict[str, Any]]) -> None:
    done = stream(["one[^a]\n\n", "two[^b]\n\n", "three\n\n", "[^b]: B\n", "[^a]: A\n\n", "end"])
    assert "one[^a]" in done["states"][2]
    numbers = re.findall(r'aria-label="Footnote (\d)"', done["html"])
    assert numbers == ["2", "1"]  # numbered in the order of the notes
    assert "[^" not in done["html"]


def test_without_the_libraries_text_is_shown_verbatim(page: Any) -> None:
    shown = page.evaluate(
        """async () => {
          const { streamMaker } = await import('/page/markdown_stream.js');
          const root = document.createElement('div');
          const stream = streamMaker(null)(root);
          for (const piece of ['**a**\\n', '<b>']) { stream.append(piece); stream.render(true); }
          return [root.textContent, root.children.length];
        }"""
    )
    assert shown == ["**a**\n<b>", 0]
