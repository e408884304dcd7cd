"""Documents built from texts, and positions in them."""

from __future__ import annotations

from deepseek_optimizer.longdoc import Document, Page, TextFile


def test_of_one_text_and_of_several() -> None:
    (file,) = Document.of_texts("one\r\ntwo\rthree\0\ud800").files
    assert (file.name, file.text) == ("text", "one\ntwo\nthree\ufffd\ufffd")
    document = Document.of_texts({"b.md": "text\n\n# Head\n", "a.txt": "# none"})
    assert [(file.name, file.headings) for file in document.files] == [("b.md", (6,)), ("a.txt", ())]
    assert document.characters == 19 and not document.problems


def test_lines_and_pages() -> None:
    file = TextFile("a", "ab\ncd\n\nef", pages=(Page(0, 3, 1), Page(3, 3, 2), Page(3, 9, 3)))
    assert [file.line_of(at) for at in range(9)] == [1, 1, 1, 2, 2, 2, 3, 4, 4]
    assert [file.page_of(at) for at in (0, 2, 3, 8)] == [1, 1, 3, 3], "the page in between is empty"
    assert TextFile("a", "x").page_of(0) is None
