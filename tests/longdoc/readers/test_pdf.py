"""PDF: pages, passwords, files that are broken or contain only images."""

from __future__ import annotations

import logging

import pytest

from deepseek_optimizer import DocumentError
from deepseek_optimizer.longdoc import read_upload
from support.documents import pdf


def test_pages_and_their_numbers() -> None:
    file = read_upload("a.pdf", pdf(["First page (one).\nSecond line.", "Näxt päge.", "Third."]))
    assert [file.text[page.start : page.end] for page in file.pages] == [
        "First page (one).\nSecond line.\n\n", "Näxt päge.\n\n", "Third.\n\n",
    ]  # fmt: skip
    assert [page.number for page in file.pages] == [1, 2, 3]
    assert [file.page_of(file.text.index(word)) for word in ("First", "Second", "Näxt", "Third")] == [1, 1, 2, 3]
    assert file.line_of(file.text.index("Näxt")) == 4
    assert not file.warnings


def test_pages_without_text_are_reported_and_counted() -> None:
    file = read_upload("a.pdf", pdf(["First.", "", "Third."]))
    assert file.page_of(file.text.index("Third")) == 3
    remedy = "dso longdoc and dso serve read them with an OCR model (--ocr MODEL)"
    assert file.warnings == (f"pages without text (empty or images): 2; {remedy}",)


def test_only_images() -> None:
    with pytest.raises(DocumentError, match=r"^scan.pdf: has no text on its 2 pages, only images; .*--ocr MODEL.*OCR"):
        read_upload("scan.pdf", pdf(["", ""]))


@pytest.mark.parametrize("algorithm", ["RC4-40", "RC4-128", "AES-128", "AES-256"])
def test_encrypted(algorithm: str) -> None:
    assert read_upload("open.pdf", pdf(["Anyone may read."], user="", algorithm=algorithm)).text.strip() == "Anyone may read."
    with pytest.raises(DocumentError, match="^closed.pdf: is encrypted and needs a password"):
        read_upload("closed.pdf", pdf(["Only some may."], user="secret", algorithm=algorithm))


def test_broken(caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]) -> None:
    whole = pdf(["Some text.", "More text."])
    with pytest.raises(DocumentError, match=r"^a.pdf: is a damaged PDF \(.+\)"):
        read_upload("a.pdf", whole[: len(whole) // 4])
    assert "Some text." in read_upload("a.pdf", whole.replace(b"startxref\n", b"startxref\n1")).text, "pypdf finds its way"
    assert not caplog.records and capfd.readouterr() == ("", ""), "and says nothing of it"
    assert logging.getLogger("pypdf").propagate, "which others may still want to hear"


def test_one_broken_page_of_several(monkeypatch: pytest.MonkeyPatch) -> None:
    from pypdf import PageObject

    extract = PageObject.extract_text
    monkeypatch.setattr(PageObject, "extract_text", lambda page: 1 / 0 if page.page_number == 1 else extract(page))
    file = read_upload("a.pdf", pdf(["First.", "Second.", "Third."]))
    assert file.text == "First.\n\nThird.\n\n" and file.page_of(file.text.index("Third")) == 3
    assert file.warnings == ("damaged pages that were left out: 2",)
    monkeypatch.setattr(PageObject, "extract_text", lambda page: 1 / 0)
    with pytest.raises(DocumentError, match="none of its 3 pages can be read"):
        read_upload("a.pdf", pdf(["First.", "Second.", "Third."]))
