"""Which reader is used for a file, and that arbitrary bytes raise only the documented errors."""

from __future__ import annotations

import random
import sys
from io import BytesIO

import pytest

from deepseek_optimizer import DocumentError, MissingPackageError
from deepseek_optimizer.longdoc import Page, read_upload
from support.documents import pdf, random_text


def docx(*paragraphs: str) -> bytes:
    from docx import Document

    word = Document()
    for paragraph in paragraphs:
        word.add_paragraph(paragraph)
    out = BytesIO()
    word.save(out)
    return out.getvalue()


@pytest.mark.parametrize("name", ["report.pdf", "report", "report.txt", "report.docx"])
def test_the_format_is_detected_from_the_content(name: str) -> None:
    assert read_upload(name, pdf(["What it says."])).pages == (Page(0, 15, 1),)
    assert read_upload(name, docx("What it says.")).text == "What it says.\n\n"
    if name != "report.txt":  # a text file may be about HTML
        assert read_upload(name, b"<!DOCTYPE html>\n<html><p>What <b>it</b> says.").text == "What it says.\n\n"


def test_ambiguous_content() -> None:
    assert read_upload("a.md", b"<!doctype html> begins a page").text == "<!doctype html> begins a page"
    assert read_upload("a.txt", b"A file that begins with %PDF- is a PDF.").pages == ()
    assert read_upload("a.html", b"just text").text == "just text\n\n"
    with pytest.raises(DocumentError, match="a.pdf: is not a PDF: it does not start with %PDF"):
        read_upload("a.pdf", b"just text")
    with pytest.raises(DocumentError, match="a.docx: is a damaged .docx"):
        read_upload("a.docx", b"just text")


@pytest.mark.parametrize("name", ["a", "a.txt", "a.md", "a.html", "a.pdf", "a.docx", "a.py"])
@pytest.mark.parametrize("data", [b"", b" \n\t\n"])
def test_empty_files(name: str, data: bytes) -> None:
    with pytest.raises(DocumentError, match=rf"^{name}: .*(empty|not a PDF|damaged .docx)"):
        read_upload(name, data)


@pytest.mark.parametrize(
    "begin, said",
    [
        (b"\x89PNG\r\n\x1a\n", "a PNG image"),
        (b"\x1f\x8b\x08", "gzip"),
        (b"PK\x03\x04rest", "a zip archive"),
        (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "old or encrypted Office file; save it as .docx"),
        (b"{\\rtf1 text}", "RTF"),
        (b"\0" * 257 + b"ustar", "tar"),
    ],
)
def test_binary_formats_are_named(begin: bytes, said: str) -> None:
    with pytest.raises(DocumentError, match=f"^photo: is .*{said}"):
        read_upload("photo", begin + bytes(range(256)))


@pytest.mark.parametrize(
    "module, package, name, data",
    [
        ("pypdf", "pypdf", "a.pdf", pdf(["x"])),
        ("docx", "python-docx", "a.docx", docx("x")),
        ("lxml", "lxml", "a.html", b"<p>x"),
        ("charset_normalizer", "charset-normalizer", "a.txt", "Привет всем".encode("cp1251")),
    ],
)
def test_missing_libraries_are_named(
    module: str, package: str, name: str, data: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert read_upload(name, data).text
    for loaded in [known for known in sys.modules if known.split(".")[0] == module]:
        monkeypatch.setitem(sys.modules, loaded, None)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingPackageError, match=rf'needs {package}, .*pip install "deepseek-optimizer\[longdoc\]"'):
        read_upload(name, data)


def test_damaged_files_are_read_or_rejected() -> None:
    """Bytes changed, removed, repeated: text with valid positions, or a DocumentError that names the file."""
    rng = random.Random(5)
    page = (
        "<html><head><title>T</title></head><body><h1>Head</h1><table><tr><td>a<td>b</table><pre>x</pre>"
        + "<p>text &amp; so" * 9
    )
    originals = {
        "a.pdf": pdf(["One page.", "Another."]),
        "b.pdf": pdf(["One page."], user="", algorithm="AES-256"),
        "a.docx": docx("One.", "Two."),
        "a.html": page.encode(),
        "a.md": random_text(rng, 2000).encode(),
    }
    read = 0
    for name, data in originals.items():
        for _ in range(60):
            spoilt = bytearray(data)
            for _ in range(rng.choice((1, 3, 30))):
                at = rng.randrange(len(spoilt))
                if rng.random() < 0.6:
                    spoilt[at] = rng.randrange(256)
                elif rng.random() < 0.5:
                    del spoilt[at : at + rng.randrange(1, 50)]
                else:
                    spoilt[at:at] = spoilt[at : at + rng.randrange(1, 200)]
                spoilt = spoilt or bytearray(b"x")
            try:
                file = read_upload(name, bytes(spoilt))
            except DocumentError as error:
                assert error.file == name and str(error).startswith(f"{name}: ") and len(str(error)) < 500
                continue
            read += 1
            assert file.text and "\0" not in file.text and "\r" not in file.text
            assert all(0 <= page.start <= page.end <= len(file.text) for page in file.pages)
            assert all(0 <= at < len(file.text) for at in file.headings)
            file.text.encode()
    assert 60 < read < 300, "some files are readable and some are not"
