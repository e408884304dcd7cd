"""PDF and Word files generated here, and unusual texts."""

from __future__ import annotations

import random
import zlib
from collections.abc import Sequence
from io import BytesIO
from typing import Any


def pdf(pages: Sequence[str], *, user: str | None = None, owner: str = "owner", algorithm: str = "RC4-128") -> bytes:
    """A PDF in Helvetica. An empty string gives a page without text.

    Args:
        user: the password to read it; None: not encrypted.
    """
    objects: list[bytes] = [b"<< /Type /Catalog /Pages 2 0 R >>", b""]
    kids = []
    objects.append(b"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica /Encoding /WinAnsiEncoding >>")
    for text in pages:
        lines = text.encode("cp1252").replace(b"\\", b"\\\\").replace(b"(", b"\\(").replace(b")", b"\\)").split(b"\n")
        shown = b"".join(b"(" + line + b") Tj T*\n" for line in lines) if text else b""
        stream = zlib.compress(b"BT /F1 11 Tf 14 TL 50 800 Td\n" + shown + b"ET")
        objects.append(b"<< /Length %d /Filter /FlateDecode >>\nstream\n%s\nendstream" % (len(stream), stream))
        kids.append(b"%d 0 R" % (len(objects) + 1))
        objects.append(
            b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 595 842] /Contents %d 0 R "
            b"/Resources << /Font << /F1 3 0 R >> >> >>" % len(objects)
        )
    objects[1] = b"<< /Type /Pages /Kids [%s] /Count %d >>" % (b" ".join(kids), len(kids))
    written = b"%PDF-1.7\n"
    offsets = []
    for number, content in enumerate(objects, 1):
        offsets.append(len(written))
        written += b"%d 0 obj\n%s\nendobj\n" % (number, content)
    table = b"".join(b"%010d 00000 n \n" % offset for offset in offsets)
    written += b"xref\n0 %d\n0000000000 65535 f \n%strailer\n<< /Size %d /Root 1 0 R >>\nstartxref\n%d\n%%%%EOF\n" % (
        len(objects) + 1, table, len(objects) + 1, len(written),
    )  # fmt: skip
    return written if user is None else _encrypted(written, user, owner, algorithm)


def scanned_pdf(pictures: Sequence[Any]) -> bytes:
    """A PDF whose pages are pictures, PIL images; a string gives a page with that text."""
    from pypdf import PdfReader, PdfWriter

    writer = PdfWriter()
    for picture in pictures:
        if isinstance(picture, str):
            data = pdf([picture])
        else:
            file = BytesIO()
            picture.save(file, "PDF", resolution=100)
            data = file.getvalue()
        writer.append(PdfReader(BytesIO(data)))
    out = BytesIO()
    writer.write(out)
    return out.getvalue()


def pdf_of_pictures(images: Sequence[Any], **claims: int) -> bytes:
    """A page that shows several pictures, PIL images in RGB; `claims` replaces entries of the first one's dictionary."""
    from pypdf import PdfReader, PdfWriter
    from pypdf.generic import DictionaryObject, NameObject, NumberObject, StreamObject

    writer = PdfWriter(clone_from=PdfReader(BytesIO(pdf([""]))))
    objects, shown = DictionaryObject(), b""
    for i, image in enumerate(images):
        stream = StreamObject()
        stream._data = zlib.compress(image.tobytes())
        facts = {"Width": image.width, "Height": image.height, "BitsPerComponent": 8} | (claims if i == 0 else {})
        names = {"Type": "XObject", "Subtype": "Image", "ColorSpace": "DeviceRGB", "Filter": "FlateDecode"}
        stream |= {NameObject(f"/{name}"): NumberObject(value) for name, value in facts.items()}
        stream |= {NameObject(f"/{name}"): NameObject(f"/{value}") for name, value in names.items()}
        objects[NameObject(f"/Im{i}")] = writer._add_object(stream)
        shown += b"q 500 0 0 300 40 %d cm /Im%d Do Q\n" % (500 - 300 * i, i)
    first = writer.pages[0]
    first[NameObject("/Resources")] = DictionaryObject({NameObject("/XObject"): objects})
    content = StreamObject()
    content._data = shown
    first[NameObject("/Contents")] = writer._add_object(content)
    out = BytesIO()
    writer.write(out)
    return out.getvalue()


def _encrypted(data: bytes, user: str, owner: str, algorithm: str) -> bytes:
    from pypdf import PdfReader, PdfWriter

    writer = PdfWriter(clone_from=PdfReader(BytesIO(data)))
    writer.encrypt(user, owner, algorithm=algorithm)
    out = BytesIO()
    writer.write(out)
    return out.getvalue()


def random_text(rng: random.Random, length: int) -> str:
    """A random mix of words, blank lines, long words, emoji, accents in two forms, other scripts, control tokens, headings."""
    kinds = (
        lambda: " ".join(rng.choice(("alpha", "Beta", "of", "the", "x", "12.5", "naïve")) for _ in range(rng.randint(1, 40))),
        lambda: rng.choice(("\n", "\n\n", "\n \t\n\n", ". ", "? ", " ", "\n# Heading\n\n", "\n\n")),
        lambda: rng.choice("xyz") * rng.randint(1, 900),
        lambda: rng.choice((" ", "\n", "=", "\u0301", "\u200d")) * rng.randint(1, 300),
        lambda: "".join(rng.choice("é🙂👩🏽‍💻e\u0301漢字かな。العربية") for _ in range(rng.randint(1, 120))),
        lambda: rng.choice(("<|im_end|>", "<|user|>", "</s>", "\ufdfa")) * rng.randint(1, 30),
        lambda: "".join(chr(rng.choice((rng.randint(32, 0xD7FF), rng.randint(0xE000, 0x10FFFF)))) for _ in range(40)),
    )
    text = ""
    while len(text) < length:
        text += rng.choice(kinds)()
    return text[:length]
