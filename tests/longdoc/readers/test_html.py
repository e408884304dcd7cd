"""HTML: the visible text of a page, and pages built to take long."""

from __future__ import annotations

import pytest

from deepseek_optimizer import DocumentError
from deepseek_optimizer.longdoc import read_upload

PAGE = """<!DOCTYPE html><html lang="en"><head><title>The Title</title><style>p {color: red}</style>
<script>document.write("<p>never")</script></head><body>
<h1>First
 heading</h1><p>A paragraph over
two lines with <b>bold</b><i>italic</i> &amp; a<br>break.<p>Another one, not closed
<div hidden>hidden</div><div style="display: none">none</div><!-- comment --><template>t</template>
<ul><li>one<li>two</ul>
<table><caption>Cap</caption><tr><th>Name<th>Value<tr><td>a <b>b</b></td><td>1<script>2</script></td></tr></table>
<pre>kept   as
  it is</pre><h2>Second</h2><textarea>typed</textarea>the end</body></html>"""


def test_a_page() -> None:
    file = read_upload("a.html", PAGE.encode())
    assert file.text == (
        "# First heading\n\nA paragraph over two lines with bolditalic & a\nbreak.\n\nAnother one, not closed\n\n"
        "one\n\ntwo\n\nCap\n\nName | Value\na b | 1\n\nkept   as\n  it is\n\n## Second\n\nthe end\n\n"
    )
    assert [file.text[at:].split("\n")[0] for at in file.headings] == ["# First heading", "## Second"]


def test_the_title_is_the_heading_if_there_is_no_other() -> None:
    assert read_upload("a", b"<html><title>T &amp; U</title><p>x").text == "# T & U\n\nx\n\n"


def test_layout_tables_are_read_as_text() -> None:
    page = "<table><tr><td><p>left</p><table><tr><td>a<td>b</table><td>right</table>"
    assert read_upload("a.html", page.encode()).text == "left\n\na | b\n\nright\n\n"


@pytest.mark.parametrize("encoding", ["utf-8", "windows-1251", "shift_jis", "utf-16"])
def test_encodings(encoding: str) -> None:
    words = {"windows-1251": "Привет", "shift_jis": "日本語の文"}.get(encoding, "Привет 日本")
    page = f'<html><head><meta charset="{encoding}"></head><body>{words}</body></html>'
    assert read_upload("a.html", page.encode(encoding)).text.strip() == words


@pytest.mark.parametrize("page", ["<html><script>x</script></html>", "<!doctype html>", "<html></html>"])
def test_pages_without_visible_text(page: str) -> None:
    with pytest.raises(DocumentError, match="^a.html: has no text"):
        read_upload("a.html", page.encode())


@pytest.mark.parametrize(
    "unit", ["<p>", "<div>", "<a ", "<!--", "<b><i></b>", "<table><tr><td>", "&#", "</div>", "<h1>", "<![CDATA[", '<p style="']
)
def test_pages_built_to_take_long(unit: str) -> None:
    """Python's html.parser takes minutes over some of these."""
    page = "<html><body>begin " + unit * 50_000 + " end"
    file = read_upload("a.html", page.encode())
    assert file.text.startswith("begin")
    assert "end" in file.text or file.warnings or "<!--" in unit or unit in ("<a ", "<![CDATA[", '<p style="')
