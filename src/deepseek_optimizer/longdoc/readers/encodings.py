"""Decodes bytes: by a byte order mark, else as UTF-8, else by a guess. Guesses and losses are reported as warnings."""

from __future__ import annotations

import codecs
import re

from ...errors import DocumentError, MissingPackageError
from .signatures import name_of

_MARKS = (  # longer ones first: that of UTF-32 starts with that of UTF-16
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_HEAD = 8000  # bytes that are searched for NUL to recognize binary files, as in Git
_SAMPLE = 32 << 10  # bytes from which the encoding is guessed
_CONTROL = re.compile(r"[\x01-\x07\x0e-\x1a\x1c-\x1f\x7f]")
_HIGH = re.compile(rb"[\x80-\xff]")
_ABOVE_ASCII = bytes(range(128, 256))


def decode(name: str, data: bytes, declared: str | None = None) -> tuple[str, tuple[str, ...]]:
    """(text, warnings) of a file's bytes.

    Args:
        declared: the encoding that the file itself declares; used if the bytes are not UTF-8.

    Raises:
        DocumentError: it is empty or not text.
        MissingPackageError: charset-normalizer is needed and not installed.
    """
    if not data:
        raise DocumentError(name, "is empty")
    text, warnings = _decode(name, data, declared)
    if not text.strip():
        raise DocumentError(name, "is empty: it contains only white space")
    zeros = text.count("\0")
    if zeros > 0.02 * len(text):
        raise DocumentError(name, f"is not text: it contains {zeros:,} NUL characters")
    controls = len(_CONTROL.findall(text[: 1 << 16]))
    if controls > 0.02 * min(len(text), 1 << 16):
        raise DocumentError(name, "is not text: it contains many control characters")
    if zeros:
        warnings += (f"{zeros:,} NUL characters were replaced by U+FFFD",)
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
        return data.decode(wide, "replace"), (f"read as {wide}, a guess, since there is no byte order mark",)
    try:
        return data.decode("utf-8"), ()
    except UnicodeDecodeError:
        return _not_utf8(data, declared)


def _marked(data: bytes, encoding: str) -> tuple[str, tuple[str, ...]]:
    try:
        return data.decode(encoding), ()
    except UnicodeDecodeError:
        text = data.decode(encoding, "replace")
        return text, (_lost(text, f"{encoding.removesuffix('-sig')} (from the byte order mark)"),)


def _wide(head: bytes) -> str | None:
    """Recognizes UTF-16 without a byte order mark: most characters of most texts have a zero byte on the same side."""
    even, odd = head[::2].count(0), head[1::2].count(0)
    if len(head) >= 8 and max(even, odd) > len(head) // 5 and min(even, odd) * 8 < max(even, odd):
        return "utf-16-le" if odd > even else "utf-16-be"
    return None


def _not_utf8(data: bytes, declared: str | None) -> tuple[str, tuple[str, ...]]:
    text = data.decode("utf-8", "replace")
    bad = text.count("\ufffd")
    good = len(text) - len(data.translate(None, _ABOVE_ASCII)) - bad  # valid characters beyond ASCII
    if good >= bad:  # damaged UTF-8, or UTF-8 with lines in another encoding
        return text, (_lost(text, "UTF-8"),)
    if declared:
        try:
            return data.decode(declared), ()
        except (LookupError, ValueError):
            pass
    guess = _guess(data)
    if guess is not None:
        try:
            return data.decode(guess), (f"not UTF-8: read as {guess}, a guess",)
        except UnicodeDecodeError:
            text = data.decode(guess, "replace")
            return text, (_lost(text, f"{guess}, a guess"),)
    return text, (_lost(text, "UTF-8"),)


def _guess(data: bytes) -> str | None:
    """Guesses the encoding from the text around its first byte beyond ASCII."""
    match = _HIGH.search(data)
    first = match.start() if match else 0
    sample = data[max(first - _SAMPLE // 8, 0) : first + _SAMPLE]
    high, letters = len(_HIGH.findall(sample)), len(re.findall(rb"[A-Za-z]", sample))
    if high < 64 and 4 * high < letters and _decodes(data, "cp1252"):
        return "cp1252"  # a few accents among plain letters do not distinguish Western encodings; this is the most common one
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
    return f"{text.count(chr(0xFFFD)):,} invalid sequences in {encoding} were replaced by U+FFFD, the first in line {line:,}"
