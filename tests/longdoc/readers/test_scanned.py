"""Scanned pages: read by what reads pictures, if it is given, and reported otherwise."""

from __future__ import annotations

import io
import json
import struct
import zlib
from typing import Any

import pytest

from deepseek_optimizer import DocumentError
from deepseek_optimizer.errors import BackendError, CheckpointError, RequestError
from deepseek_optimizer.longdoc import Document, RecognizedLine, cite, read_documents
from deepseek_optimizer.longdoc.readers import page_images, read
from deepseek_optimizer.longdoc.saved_document import restore, store
from deepseek_optimizer.longdoc.split import Chunk
from support.documents import pdf, pdf_of_pictures, scanned_pdf

Image = pytest.importorskip("PIL.Image", reason="needs Pillow")
features = pytest.importorskip("PIL.features", reason="needs Pillow")
RED, BLUE = (200, 30, 30), (30, 30, 200)


def page(color: Any = RED, width: int = 85, height: int = 110) -> Any:
    return Image.new("RGB", (width, height), color)


def encoded(image: Any, format: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


class Reader:
    """Says what it sees: the color in the upper left corner and the size."""

    def __init__(self, *lines: RecognizedLine) -> None:
        self.lines, self.seen = lines, []

    def read(self, image: Any) -> list[RecognizedLine]:
        color = "red" if image.getpixel((2, 2))[0] > 100 else "blue"
        self.seen.append(image)
        return list(self.lines) or [RecognizedLine(f"A {color} page of {image.width} x {image.height}.", (0.1, 0.2, 0.9, 0.3))]


def test_pages_are_read_in_order() -> None:
    reader = Reader()
    file = read("a.pdf", scanned_pdf([page(), "Typed text.", page(BLUE, 60, 80)]), reader)
    assert file.text == "A red page of 85 x 110.\n\nTyped text.\n\nA blue page of 60 x 80.\n\n"
    assert [file.page_of(file.text.index(word)) for word in ("red", "Typed", "blue")] == [1, 2, 3]
    assert file.box_of(file.text.index("blue"), file.text.index("blue") + 4) == (0.1, 0.2, 0.9, 0.3)
    assert file.box_of(file.text.index("Typed"), file.text.index("Typed") + 4) is None
    assert file.warnings == ("pages that the OCR model has read: 1, 3",)
    assert len(reader.seen) == 2, "a page with text is not read again"


def test_without_a_reader_pages_are_reported() -> None:
    with pytest.raises(DocumentError, match=r"^a.pdf: has no text on its 2 pages, only images; .*\(--ocr MODEL\)"):
        read("a.pdf", scanned_pdf([page(), page()]))
    file = read("a.pdf", scanned_pdf(["Typed text.", page()]))
    assert file.text == "Typed text.\n\n" and "--ocr MODEL" in file.warnings[0]


def test_lines_keep_their_places() -> None:
    lines = [
        RecognizedLine("\n First line \n", (0.0, 0.0, 0.5, 0.1)),
        RecognizedLine("  "),
        RecognizedLine("Second\r\nparagraph", (0.0, 0.1, 0.9, 0.4)),
        RecognizedLine("Third"),
    ]
    file = read("a.pdf", scanned_pdf(["Typed.", page()]), Reader(*lines))
    assert file.text == "Typed.\n\nFirst line\nSecond\nparagraph\nThird\n\n"
    assert [(file.text[one.start : one.end], one.box) for one in file.boxes] == [
        ("First line", (0.0, 0.0, 0.5, 0.1)),
        ("Second\nparagraph", (0.0, 0.1, 0.9, 0.4)),
    ]
    start = file.text.index("line\nSecond")
    assert file.box_of(start, start + 8) == (0.0, 0.0, 0.9, 0.4)
    assert file.box_of(file.text.index("Third"), file.text.index("Third") + 5) is None


def test_citations_have_page_and_box() -> None:
    line = RecognizedLine("The green key is in the lighthouse.", (0.1, 0.5, 0.8, 0.55))
    file = read("a.pdf", scanned_pdf(["Typed text about nothing.", page()]), Reader(line))
    document = Document((file,))
    (citation,) = cite("in the lighthouse", [Chunk(0, 0, 0, len(file.text), 20)], document, question="Where is the green key?")
    assert (citation.page, citation.box, citation.text) == (2, (0.1, 0.5, 0.8, 0.55), "The green key is in the lighthouse.")


def test_a_rotated_page_and_one_in_strips() -> None:
    from pypdf import PdfReader, PdfWriter

    writer = PdfWriter(clone_from=PdfReader(io.BytesIO(scanned_pdf([page()]))))
    writer.pages[0].rotate(90)
    out = io.BytesIO()
    writer.write(out)
    assert "A red page of 110 x 85." in read("a.pdf", out.getvalue(), Reader()).text

    strips = pdf_of_pictures([page(RED, 80, 30), page(BLUE, 80, 20)])
    reader = Reader()
    assert "A red page of 80 x 50." in read("a.pdf", strips, reader).text
    assert reader.seen[0].getpixel((40, 40)) == BLUE


def test_narrow_strips() -> None:
    strips = pdf_of_pictures([page(RED, 410, 2)] * 10)
    assert "A red page of 410 x 20." in read("a.pdf", strips, Reader()).text


def test_jpeg_2000() -> None:
    """Archives use it in PDFs; as a file it is not accepted."""
    from pypdf import PdfReader, PdfWriter
    from pypdf.generic import NameObject

    if not features.check("jpg_2000"):
        pytest.skip("this Pillow cannot write JPEG 2000")
    writer = PdfWriter(clone_from=PdfReader(io.BytesIO(pdf_of_pictures([page()]))))
    picture = writer.pages[0]["/Resources"]["/XObject"]["/Im0"].get_object()  # type: ignore[index]
    picture._data = encoded(page(), "JPEG2000")
    picture[NameObject("/Filter")] = NameObject("/JPXDecode")
    out = io.BytesIO()
    writer.write(out)
    assert "A red page of 85 x 110." in read("a.pdf", out.getvalue(), Reader()).text


def test_several_pictures_of_a_page() -> None:
    """They have no places on the page, and small ones are logos."""
    file = read("a.pdf", pdf_of_pictures([page(RED, 80, 30), page(BLUE, 70, 30), page(BLUE, 5, 5)]), Reader())
    assert file.text == "A red page of 80 x 30.\nA blue page of 70 x 30.\n\n" and file.boxes == ()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (pdf_of_pictures([page()], Width=60_000, Height=60_000), "has pictures of 3,600,000,000 pixels, more than 67,108,864"),
        (pdf_of_pictures([page()], Height=100_000), "1 page"),
        (pdf_of_pictures([page(RED, 4_000, 1)]), "one side is more than 200 times the other"),
        (pdf_of_pictures([page(RED, 9, 9)] * 65), "has 65 pictures, more than 64"),
        (scanned_pdf([page()]).replace(b"\xff\xd8\xff", b"\xff\xd8\0"), "1 page"),
    ],
    ids=["bomb", "missing rows", "narrow", "many", "no JPEG"],
)
def test_hostile_pages_are_reported_in_one_line(data: bytes, message: str) -> None:
    with pytest.raises(DocumentError, match=message) as error:
        read("a.pdf", data, Reader())
    assert "\n" not in str(error.value) and len(str(error.value)) < 400


@pytest.mark.parametrize("within", [False, True], ids=["names", "contents"])
def test_pixels_that_are_decoded_count(within: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A picture is decoded once for each of its names; and pictures within the contents have no dictionary to count first."""
    from pypdf import PdfReader, PdfWriter
    from pypdf.generic import NameObject, StreamObject

    converted: list[Any] = []
    rgb = page_images.picture_job.rgb
    monkeypatch.setattr(page_images.picture_job, "rgb", lambda image: converted.append(image) or rgb(image))
    monkeypatch.setattr(page_images, "MAX_PIXELS", 3 * 85 * 110)
    writer = PdfWriter(clone_from=PdfReader(io.BytesIO(pdf_of_pictures([page()]))))
    objects: Any = writer.pages[0]["/Resources"]["/XObject"]  # type: ignore[index]
    if within:
        content = StreamObject()
        content._data = b"q BI /W 170 /H 220 /BPC 1 /CS /G /F /AHx ID " + b"00" * (22 * 220) + b"> EI Q"
        writer.pages[0][NameObject("/Contents")] = writer._add_object(content)
    else:
        objects |= {NameObject(f"/Also{i}"): objects.raw_get("/Im0") for i in range(3)}
    out = io.BytesIO()
    writer.write(out)
    with pytest.raises(DocumentError, match=r"1 \(has pictures of [34][67],[47]\d0 pixels, more than 28,050\)"):
        read("a.pdf", out.getvalue(), Reader())
    assert len(converted) == within  # the one in a dictionary comes first


def test_forms_in_forms() -> None:
    """30 forms, each of which shows the next one under 8 names: 8^30 ways lead to the picture in the last one."""
    from pypdf import PdfReader, PdfWriter
    from pypdf.generic import DictionaryObject, NameObject, StreamObject

    writer = PdfWriter(clone_from=PdfReader(io.BytesIO(pdf_of_pictures([page()]))))
    resources: Any = writer.pages[0]["/Resources"]
    shown = resources["/XObject"]
    for _ in range(30):
        form = StreamObject()
        form[NameObject("/Subtype")] = NameObject("/Form")
        form[NameObject("/Resources")] = DictionaryObject({NameObject("/XObject"): shown})
        inner = writer._add_object(form)
        shown = DictionaryObject({NameObject(f"/F{i}"): inner for i in range(8)})
    resources[NameObject("/XObject")] = shown
    out = io.BytesIO()
    writer.write(out)
    assert read("a.pdf", out.getvalue(), Reader()).text == "A red page of 85 x 110.\n\n"


def test_one_hostile_page_of_several() -> None:
    from pypdf import PdfReader, PdfWriter

    writer = PdfWriter()
    for data in (pdf(["Typed."]), pdf_of_pictures([page(RED, 4_000, 1)]), scanned_pdf([page()])):
        writer.append(PdfReader(io.BytesIO(data)))
    out = io.BytesIO()
    writer.write(out)
    file = read("a.pdf", out.getvalue(), Reader())
    assert file.text == "Typed.\n\nA red page of 85 x 110.\n\n"
    assert file.warnings[0] == "pages that the OCR model has read: 3"
    assert file.warnings[1].startswith("pages whose pictures cannot be read: 2 (has 4,000 x 1 pixels: one side")


def test_unusual_pictures_of_pages() -> None:
    for image in (page().convert("CMYK"), page().convert("L"), page().convert("1"), page().convert("P")):
        assert "page of 85 x 110." in read("a.pdf", scanned_pdf([image]), Reader()).text


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "TIFF", "BMP", "GIF"])
def test_pictures_are_documents_of_one_page(format: str) -> None:
    data = encoded(page(), format)
    file = read("a.bin", data, Reader())
    assert file.text == "A red page of 85 x 110.\n\n" and file.page_of(0) == 1
    with pytest.raises(DocumentError, match=r"^a.bin: is a .*\(--ocr MODEL\)"):
        read("a.bin", data)


def test_hostile_pictures_are_reported_in_one_line() -> None:
    bomb = bytearray(encoded(page()))
    bomb[16:24] = struct.pack(">II", 60_000, 60_000)
    bomb[29:33] = struct.pack(">I", zlib.crc32(bomb[12:29]))
    animated = encoded(page(), "GIF", save_all=True, append_images=[page(BLUE)])
    for data, message in (
        (bytes(bomb), "pixels"),
        (encoded(page())[:60], "is damaged"),
        (encoded(Image.new("1", (4_000, 1))), "more than 200 times"),
        (animated, "is animated"),
    ):
        with pytest.raises(DocumentError, match=message) as error:
            read("a.png", data, Reader())
        assert "\n" not in str(error.value)


def test_a_reader_that_finds_nothing_or_fails() -> None:
    class Silent:
        def read(self, image: Any) -> list[RecognizedLine]:
            return [RecognizedLine(" ")]

    class Refusing:
        def read(self, image: Any) -> list[RecognizedLine]:
            raise RequestError("pictures", "are too small")

    class Failing:
        def read(self, image: Any) -> list[RecognizedLine]:
            raise BackendError("the model failed")

    data = scanned_pdf([page()])
    with pytest.raises(DocumentError, match="the OCR model found none"):
        read("a.pdf", data, Silent())
    with pytest.raises(DocumentError, match="cannot be read: 1 .pictures: are too small"):
        read("a.pdf", data, Refusing())
    with pytest.raises(BackendError, match="the model failed"):
        read("a.pdf", data, Failing())
    with pytest.raises(DocumentError, match="pictures: are too small"):
        read("a.png", encoded(page()), Refusing())


def test_directories(tmp_path: Any) -> None:
    (tmp_path / "a.pdf").write_bytes(scanned_pdf([page()]))
    (tmp_path / "b.png").write_bytes(encoded(page(BLUE)))
    (tmp_path / "c.txt").write_text("Typed.")
    document = read_documents(tmp_path, ocr=Reader())
    assert [file.text.strip() for file in document.files] == ["A red page of 85 x 110.", "A blue page of 85 x 110.", "Typed."]
    without = read_documents(tmp_path)
    assert len(without.problems) == 2 and all("--ocr MODEL" in problem.message for problem in without.problems)


def test_boxes_are_saved(tmp_path: Any) -> None:
    document = Document((read("a.pdf", scanned_pdf([page()]), Reader()),))
    store(tmp_path / "document.json", document, {})
    assert restore(tmp_path / "document.json") == (document, {})
    saved = json.loads((tmp_path / "document.json").read_text())
    with pytest.raises(CheckpointError, match="damaged"):
        (tmp_path / "document.json").write_text(json.dumps({**saved, "body": saved["body"].replace("0.9", "0.8")}))
        restore(tmp_path / "document.json")
