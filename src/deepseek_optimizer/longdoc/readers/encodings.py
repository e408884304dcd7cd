"""Bytes to characters: by a byte order mark, else UTF-8, else what the bytes look like. What was guessed or lost is said."""

from __future__ import annotations

import codecs
import re

from ...errors import DocumentError, MissingPackageError
from .signatures import name_of

_MARKS = (  # the longer first: UTF-32's begins with UTF-16's
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_HEAD = 8000  # bytes that Git looks through for NUL to tell binary files
_SAMPLE = 32 << 10  # bytes that an encoding is guessed by
_CONTROL = re.compile(r"[\x01-\x07\x0e-\x1a\x1c-\x1f\x7f]")
_HIGH = re.compile(rb"[\x80-\xff]")
_ABOVE_ASCII = bytes(range(128, 256))


def decode(name: str, data: bytes, declared: str | None = None) -> tuple[str, tuple[str, ...]]:
    """(text, warnings) of a file's bytes.

    Args:
        declared: an encoding that the file itself names; it counts where the bytes are not UTF-8.

    Raises:
        DocumentError: it is empty or no text.
        MissingPackageError: charset-normalizer is needed and not installed.
    """
    if not data:
        raise DocumentError(name, "is empty")
    text, warnings = _decode(name, data, declared)
    if not text.strip():
        raise DocumentError(name, "is empty: it has nothing but white space")
    zeros = text.count("\0")
    if zeros > 0.02 * len(text):
        raise DocumentError(name, f"is not text: it has {zeros:,} NUL characters")
    controls = len(_CONTROL.findall(text[: 1 << 16]))
    if controls > 0.02 * min(len(text), 1 << 16):
        raise DocumentError(name, "is not text: it has control characters all over")
    if zeros:
        warnings += (f"{zeros:,} NUL characters stand as U+FFFD",)
    return text, warnings


def _decode(name: str, data: bytes, declared: str | None) -> tuple[str, tuple[str, ...]]:
    for mark, encoding in _MARKS:
        if data.startswith(mark):
            return _marked(data, encoding)
    known = name_of(data)
    if known:
        raise DocumentError(name, f"is {known}")
    if b"\0" in data[:_HEAD]:
        wide = _wide(data[:_HEAD])
        if wide is None:
            raise DocumentError(name, "is a binary file, not text")
        return data.decode(wide, "replace"), (f"read as {wide} without a byte order mark, which is a guess",)
    try:
        return data.decode("utf-8"), ()
    except UnicodeDecodeError:
        return _not_utf8(data, declared)


def _marked(data: bytes, encoding: str) -> tuple[str, tuple[str, ...]]:
    try:
        return data.decode(encoding), ()
    except UnicodeDecodeError:
        text = data.decode(encoding, "replace")
        return text, (_lost(text, f"{encoding.removesuffix('-sig')}, as its byte order mark says"),)


def _wide(head: bytes) -> str | None:
    """UTF-16 without a mark: most characters of most texts have a zero byte on the same side."""
    even, odd = head[::2].count(0), head[1::2].count(0)
    if len(head) >= 8 and max(even, odd) > len(head) // 5 and min(even, odd) * 8 < max(even, odd):
        return "utf-16-le" if odd > even else "utf-16-be"
    return None


def _not_utf8(data: bytes, declared: str | None) -> tuple[str, tuple[str, ...]]:
    text = data.decode("utf-8", "replace")
    bad = text.count("\ufffd")
    good = len(text) - len(data.translate(None, _ABOVE_ASCII)) - bad  # characters beyond ASCII that are right
    if good >= bad:  # UTF-8 with damage, or with lines of another encoding in it
        return text, (_lost(text, "UTF-8"),)
    if declared:
        try:
            return data.decode(declared), ()
        except (LookupError, ValueError):
            pass
    guess = _guess(data)
    if guess is not None:
        try:
            return data.decode(guess), (f"not UTF-8: read as {guess}, which is a guess",)
        except UnicodeDecodeError:
            text = data.decode(guess, "replace")
            return text, (_lost(text, f"{guess}, which is a guess"),)
    return text, (_lost(text, "UTF-8"),)


def _guess(data: bytes) -> str | None:
    """By the part of the text around its first byte beyond ASCII."""
    found = _HIGH.search(data)
    first = found.start() if found else 0
    sample = data[max(first - _SAMPLE // 8, 0) : first + _SAMPLE]
    high, letters = len(_HIGH.findall(sample)), len(re.findall(rb"[A-Za-z]", sample))
    if high < 64 and 4 * high < letters and _decodes(data, "cp1252"):
        return (
            "cp1252"  # a few accents among plain letters: too little to tell Western encodings apart, and this is the usual one
        )
    try:
        from charset_normalizer import from_bytes
    except ImportError:
        raise MissingPackageError("text that is not UTF-8", "charset-normalizer", "longdoc") from None
    best = from_bytes(sample).best()
    return None if best is None else best.encoding


def _decodes(data: bytes, encoding: str) -> bool:
    try:
        data.decode(encoding)
    except UnicodeDecodeError:
        return False
    return True


def _lost(text: str, encoding: str) -> str:
    line = text.count("\n", 0, max(text.find("\ufffd"), 0)) + 1
    return f"{text.count(chr(0xFFFD)):,} places are not {encoding}, and stand as U+FFFD; the first is in line {line:,}"
