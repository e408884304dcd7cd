"""Pages whose text is drawn as shapes, which are rendered for an OCR model."""

from __future__ import annotations

import io
import sys
from typing import Any

import pytest

from deepseek_optimizer import DocumentError
from deepseek_optimizer.longdoc import RecognizedLine
from deepseek_optimizer.longdoc.readers import pdf as pdf_reader
from deepseek_optimizer.longdoc.readers import read
from support.documents import pdf, pdf_of_pictures, scanned_pdf

pytest.importorskip("PIL", reason="needs Pillow")

BARS = b"0.8 0.1 0.1 rg 50 700 400 60 re f 0 0 0.8 RG 4 w 50 600 m 300 600 l S"  # a red bar, and a blue line below it


class Sizes:
    """Says how large a picture is, and the color a twelfth of the height below the top."""

    def read(self, image: Any) -> list[RecognizedLine]:
        red, _, blue = image.getpixel((image.width // 4, round(image.height * (842 - 730) / 842)))
        return [
            RecognizedLine(f"{image.width} x {image.height}, {'red' if red > 2 * blue else 'white'}.", (0.1, 0.1, 0.9, 0.2))
        ]


def drawn(*contents: bytes, size: tuple[int, int] = (595, 842), source: bytes | None = None) -> bytes:
    """A PDF with a page for each content stream, whose resources are those of the pages of `source`."""
    from pypdf import PdfReader, PdfWriter
    from pypdf.generic import NameObject, RectangleObject, StreamObject

    writer = PdfWriter(clone_from=PdfReader(io.BytesIO(source or pdf([""] * len(contents)))))
    for page, content in zip(writer.pages, contents, strict=True):
        stream = StreamObject()
        stream._data = content
        page[NameObject("/Contents")] = writer._add_object(stream)
        page[NameObject("/MediaBox")] = RectangleObject((0, 0, *size))
    out = io.BytesIO()
    writer.write(out)
    return out.getvalue()


def test_without_the_library_each_page_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pypdfium2", None)
    said = r"cannot be read: 1 \(draws its text, and pypdfium2, .* is not installed: pip install \"deepseek-optimizer\[vision"
    with pytest.raises(DocumentError, match=said) as error:
        read("a.pdf", drawn(BARS), Sizes())
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", [b"", b"q Q", b"50 700 m 90 90 l n % f S Tj\n", b"BT /F1 11 Tf 14 TL 50 800 Td ET"])
def test_pages_that_show_nothing_are_empty(content: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pypdfium2", None)
    with pytest.raises(DocumentError, match="the OCR model found none"):
        read("a.pdf", drawn(content), Sizes())


@pytest.mark.parametrize(
    "content",
    [b"0 0 9 9 re f", b"0 0 9 9 re\nf*\n", b"0 0 m 9 9 l S", b"/X Do", b"BT[(a)-9(b)]TJ ET", b"BT(a)Tj ET", b"/Sh1 sh"],
)
def test_pages_that_show_something(content: bytes) -> None:
    from pypdf import PdfReader

    from deepseek_optimizer.longdoc.readers.page_drawing import is_drawn

    assert is_drawn(PdfReader(io.BytesIO(drawn(content))).pages[0])


def test_a_page_is_rendered() -> None:
    pytest.importorskip("pypdfium2", reason="needs pypdfium2")
    file = read("a.pdf", drawn(b"q Q", BARS), Sizes())
    assert file.text == "1653 x 2339, red.\n\n" and file.page_of(0) == 2
    assert file.box_of(0, 4) == (0.1, 0.1, 0.9, 0.2), "a rendered page is the whole page"
    assert file.warnings[0] == "pages that the OCR model has read: 2"


def test_a_drawn_page_with_a_logo_is_rendered() -> None:
    """The logo alone would be read, and the text lost."""
    pytest.importorskip("pypdfium2", reason="needs pypdfium2")
    Image = pytest.importorskip("PIL.Image", reason="needs Pillow")
    logo = pdf_of_pictures([Image.new("RGB", (40, 40))])
    content = b"q 40 0 0 40 500 20 cm /Im0 Do Q " + BARS
    assert read("a.pdf", drawn(content, source=logo), Sizes()).text == "1653 x 2339, red.\n\n"


def test_a_huge_page_is_rendered_smaller() -> None:
    pytest.importorskip("pypdfium2", reason="needs pypdfium2")
    width, height = map(int, read("a.pdf", drawn(BARS, size=(14_400, 7_200)), Sizes()).text.split(",")[0].split(" x "))
    assert 0.99 * (1 << 23) < width * height < 1.01 * (1 << 23)


@pytest.mark.parametrize("size", [(100_000_000, 1), (1, 90_000)])
def test_a_narrow_page_is_not_rendered(size: tuple[int, int]) -> None:
    """Its shorter side would be rounded up to a pixel, and the picture would have far more pixels than others may have."""
    pytest.importorskip("pypdfium2", reason="needs pypdfium2")
    with pytest.raises(DocumentError, match=r"1 \(has .* points: one side is more than 200 times the other; crop it\)"):
        read("a.pdf", drawn(BARS, size=size), Sizes())


@pytest.fixture
def limited(monkeypatch: pytest.MonkeyPatch) -> bytes:
    """A scan that is too large for pypdf; which size that is depends on its release (7.1: A4 at 600 dpi is)."""
    from pypdf.errors import LimitReachedError

    def pictures_of_page(_: Any) -> list[Any]:
        raise LimitReachedError("Requested image buffer size 139189120 exceeds limit 75000000.")

    monkeypatch.setattr(pdf_reader, "pictures_of_page", pictures_of_page)
    return scanned_pdf([pytest.importorskip("PIL.Image", reason="needs Pillow").new("RGB", (85, 110), (200, 30, 30))])


def test_a_scan_that_is_too_large_for_pypdf_is_rendered(limited: bytes) -> None:
    pytest.importorskip("pypdfium2", reason="needs pypdfium2")
    assert read("a.pdf", limited, Sizes()).text == "171 x 220, red.\n\n"


def test_a_scan_that_is_too_large_without_the_library(limited: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pypdfium2", None)
    with pytest.raises(DocumentError, match=r"1 \(has a picture that is too large for pypdf, and pypdfium2, .* not installed"):
        read("a.pdf", limited, Sizes())
