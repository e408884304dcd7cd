"""Recognizes file formats by their first bytes."""

from __future__ import annotations

import re

_HTML = re.compile(
    rb"(?:\xef\xbb\xbf)?\s*(?:<\?xml[^>]*>\s*)?(?:<!--.{0,1000}?-->\s*)*<(?:!doctype\s+html|html)\b", re.I | re.S
)
_TEXT_ENDINGS = frozenset((".md", ".markdown", ".txt", ".log", ".php", ".vue", ".svelte", ".jinja", ".j2", ".tmpl"))

_KNOWN = (
    (b"\x89PNG\r\n", "a PNG image"),
    (b"\xff\xd8\xff", "a JPEG image"),
    (b"GIF8", "a GIF image"),
    (b"RIFF", "a RIFF file (WebP, WAV, AVI)"),
    (b"II*\0", "a TIFF image"),
    (b"MM\0*", "a TIFF image"),
    (b"\x7fELF", "a program or library (ELF)"),
    (b"\xcf\xfa\xed\xfe", "a program or library (Mach-O)"),
    (b"\x1f\x8b", "compressed (gzip); unpack it first"),
    (b"BZh", "compressed (bzip2); unpack it first"),
    (b"\xfd7zXZ\0", "compressed (xz); unpack it first"),
    (b"\x28\xb5\x2f\xfd", "compressed (zstd); unpack it first"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive; unpack it first"),
    (b"Rar!\x1a\x07", "a RAR archive; unpack it first"),
    (b"PK\x03\x04", "a zip archive (or an office format other than .docx); unpack or convert it first"),
    (b"PK\x05\x06", "an empty zip archive"),
    (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "an old or encrypted Office file; save it as .docx without a password"),
    (b"{\\rtf", "an RTF file; save it as .docx or .txt"),
    (b"%!PS", "a PostScript file; convert it to PDF"),
    (b"SQLite format 3\0", "an SQLite database"),
    (b"GGUF", "model weights (GGUF)"),
    (b"wOFF", "a font"),
    (b"wOF2", "a font"),
    (b"ID3", "an MP3 file"),
)
_PICTURES = (b"\x89PNG\r\n", b"\xff\xd8\xff", b"GIF8", b"II*\0", b"MM\0*")


def name_of(data: bytes) -> str | None:
    """The format of a non-text file, recognized by its first bytes, and what to do about it: a phrase to follow "is"."""
    if data[257:262] == b"ustar":
        return "a tar archive; unpack it first"
    return next((name for begin, name in _KNOWN if data.startswith(begin)), None)


def looks_like_pdf(ending: str, data: bytes) -> bool:
    """PDF readers accept the header within the first 1,024 bytes (ISO 32000-2, annex I), but text about PDF may contain it
    too."""
    return data.startswith(b"%PDF-") or (ending in ("", ".pdf") and b"%PDF-" in data[:1024])


def looks_like_word(ending: str, data: bytes) -> bool:
    return data.startswith(b"PK\x03\x04") and b"word/document.xml" in data


def looks_like_picture(ending: str, data: bytes) -> bool:
    bitmap = data.startswith(b"BM") and data[6:10] == bytes(4)  # two letters that a text may begin with, and reserved zeros
    return bitmap or data.startswith(_PICTURES) or (data.startswith(b"RIFF") and data[8:12] == b"WEBP")


def looks_like_html(ending: str, data: bytes) -> bool:
    return ending not in _TEXT_ENDINGS and data.lstrip()[:1] in (b"<", b"\xef") and _HTML.match(data[:8192]) is not None
