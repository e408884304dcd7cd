"""Word documents: order, headings, tables, content that python-docx skips, and malicious archives."""

from __future__ import annotations

import zipfile
from io import BytesIO
from typing import Any

import pytest

from deepseek_optimizer import DocumentError
from deepseek_optimizer.longdoc import read_upload
from deepseek_optimizer.longdoc.readers import docx as reader

W = 'xmlns:w="http://schemas.openxmlformats.org/wordprocessingml/2006/main"'


def _saved(word: Any) -> bytes:
    out = BytesIO()
    word.save(out)
    return out.getvalue()


def _with(data: bytes, name: str, change: Any) -> bytes:
    """A copy of an archive with one member changed."""
    out = BytesIO()
    with zipfile.ZipFile(BytesIO(data)) as old, zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as new:
        for member in old.infolist():
            content = old.read(member)
            new.writestr(member.filename, change(content) if member.filename == name else content)
    return out.getvalue()


def _body(inner: str) -> bytes:
    from docx import Document

    return _with(
        _saved(Document()), "word/document.xml", lambda _: f"<w:document {W}><w:body>{inner}</w:body></w:document>".encode()
    )


def test_paragraphs_headings_and_tables_in_order() -> None:
    from docx import Document

    word = Document()
    word.add_heading("The Whole", 0)
    word.add_paragraph("Before the table.")
    table = word.add_table(2, 3)
    for i, cell in enumerate(cell for row in table.rows for cell in row.cells):
        cell.text = f"cell {i}"
    table.cell(1, 0).merge(table.cell(1, 1))
    word.add_heading("A Part", 2)
    word.add_paragraph("Behind it.\twith a tab")
    file = read_upload("a.docx", _saved(word))
    assert file.text == (
        "# The Whole\n\nBefore the table.\n\ncell 0 | cell 1 | cell 2\ncell 3 cell 4 | cell 5\n\n"
        "## A Part\n\nBehind it.\twith a tab\n\n"
    )
    assert [file.text[at:].split("\n")[0] for at in file.headings] == ["# The Whole", "## A Part"]


def test_tracked_insertions_count_and_deletions_do_not() -> None:
    run = "<w:r><w:t>{}</w:t></w:r>"
    text = read_upload("a.docx", _body(
        f"<w:p>{run.format('kept ')}<w:ins>{run.format('inserted ')}</w:ins>"
        "<w:del><w:r><w:delText>deleted</w:delText></w:r></w:del>"
        f"<w:moveFrom>{run.format('moved')}</w:moveFrom><w:hyperlink>{run.format('linked')}</w:hyperlink></w:p>"
        f"<w:sdt><w:sdtContent><w:p>{run.format('in a control')}</w:p></w:sdtContent></w:sdt>"
        f"<w:tbl><w:tr><w:tc><w:tbl><w:tr><w:tc><w:p>{run.format('inner')}</w:p></w:tc></w:tr></w:tbl>"
        f"<w:p>{run.format('outer')}</w:p></w:tc></w:tr></w:tbl>"
    )).text  # fmt: skip
    assert text == "kept inserted linked\n\nin a control\n\ninner outer\n\n"


def test_footnotes_are_at_the_end() -> None:
    from docx import Document
    from docx.opc.packuri import PackURI
    from docx.opc.part import Part

    word = Document()
    word.add_paragraph("Text.")
    notes = f"<w:footnotes {W}><w:footnote><w:p><w:r><w:t>A note.</w:t></w:r></w:p></w:footnote></w:footnotes>"
    kind = "application/vnd.openxmlformats-officedocument.wordprocessingml.footnotes+xml"
    part = Part(PackURI("/word/footnotes.xml"), kind, notes.encode(), word.part.package)
    word.part.relate_to(part, "http://schemas.openxmlformats.org/officeDocument/2006/relationships/footnotes")
    assert read_upload("a.docx", _saved(word)).text == "Text.\n\nA note.\n\n"


def test_a_cell_that_spans_a_billion_columns() -> None:
    cell = '<w:tc><w:tcPr><w:gridSpan w:val="1000000000"/></w:tcPr><w:p><w:r><w:t>x</w:t></w:r></w:p></w:tc>'
    assert read_upload("a.docx", _body(f"<w:tbl><w:tr>{cell}</w:tr></w:tbl>")).text == "x\n\n"


def test_broken_archives() -> None:
    data = _body("<w:p><w:r><w:t>some text</w:t></w:r></w:p>")
    with pytest.raises(DocumentError, match="^a.docx: is a damaged .docx"):
        read_upload("a.docx", data[: len(data) // 2])
    with pytest.raises(DocumentError, match="^a.docx: is a damaged .docx"):
        read_upload("a.docx", _with(data, "word/document.xml", lambda content: content[:-20]))
    with pytest.raises(DocumentError, match="^a.docx: has no text"):
        read_upload("a.docx", _body("<w:p/>"))
    out = BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("xl/workbook.xml", "<x/>")
    with pytest.raises(DocumentError, match="^a.docx: is not a Word document"):
        read_upload("a.docx", out.getvalue())


def test_zip_bombs_are_rejected_before_unpacking(monkeypatch: pytest.MonkeyPatch) -> None:
    bomb = _with(_body("<w:p/>"), "word/document.xml", lambda content: content.replace(b"<w:p/>", b" " * (reader.MAX_XML + 1)))
    assert len(bomb) < 200_000
    monkeypatch.setattr(zipfile.ZipFile, "read", lambda *_: pytest.fail("the archive was unpacked"))
    with pytest.raises(DocumentError, match="^a.docx: unpacks to 48 MB in .* parts, more than the limit"):
        read_upload("a.docx", bomb)


def test_entities_are_not_expanded() -> None:
    levels = "".join(f'<!ENTITY a{i} "{f"&a{i - 1};" * 10}">' for i in range(1, 12))
    hostile = f'<!DOCTYPE d [<!ENTITY a0 "aaaaaaaaaa">{levels}]>'
    data = _with(
        _body("<w:p><w:r><w:t>x&amp;a11;</w:t></w:r></w:p>"),
        "word/document.xml",
        lambda content: hostile.encode() + content.replace(b"&amp;", b"&"),
    )
    try:
        assert len(read_upload("a.docx", data).text) < 100
    except DocumentError as error:
        assert "damaged" in str(error)
