"""PDF, using pypdf: the text of each page."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from threading import Lock
from typing import Any

from ...errors import DocumentError, MissingPackageError
from ..document import TextFile
from .builder import TextBuilder

_LOG = Lock()


def read(name: str, data: bytes) -> TextFile:
    """
    Raises:
        DocumentError: it is damaged, needs a password, or contains only images.
        MissingPackageError: pypdf is not installed.
    """
    try:
        from pypdf.errors import DependencyError, LimitReachedError
    except ImportError:
        raise MissingPackageError("reading PDF", "pypdf", "longdoc") from None
    try:
        with _quiet():
            return _read(name, data)
    except (DocumentError, MissingPackageError):
        raise
    except DependencyError:
        raise MissingPackageError(f"{name} is encrypted with AES; reading it", "cryptography", "longdoc") from None
    except LimitReachedError as error:
        raise DocumentError(name, f"exceeds a limit when unpacked ({error})") from error
    except Exception as error:  # a broken file can make pypdf raise anything
        raise DocumentError(name, f"is a damaged PDF ({_describe(error)}); try printing it to a new PDF") from error


def _read(name: str, data: bytes) -> TextFile:
    from pypdf import PdfReader

    if b"%PDF-" not in data[:1024]:
        raise DocumentError(name, "is not a PDF: it does not start with %PDF" if data else "is empty")
    reader = PdfReader(BytesIO(data))
    if reader.is_encrypted and not reader.decrypt(""):
        raise DocumentError(name, "is encrypted and needs a password; save a copy without one")
    builder = TextBuilder(name)
    empty, broken = [], []
    for number, page in enumerate(reader.pages, 1):
        text = ""
        try:
            text = page.extract_text()
        except MemoryError:
            raise
        except Exception:  # as above, but other pages may be readable
            broken.append(number)
        else:
            empty += [number] * (not text.strip())
        builder.page(text, number)
    pages = len(reader.pages)
    if len(empty) == pages:
        raise DocumentError(name, f"has no text on its {_pages(pages)}, only images; run text recognition (OCR) on it first")
    if len(broken) + len(empty) == pages:
        raise DocumentError(name, f"is a damaged PDF: none of its {_pages(pages)} can be read")
    if broken:
        builder.warnings.append(f"damaged pages that were left out: {_listed(broken)}")
    if empty:
        builder.warnings.append(f"pages without text (empty or images): {_listed(empty)}")
    return builder.build()


@contextmanager
def _quiet() -> Iterator[None]:
    """Silences pypdf, which logs every irregularity that it works around, thousands for some files."""
    logger: Any = logging.getLogger("pypdf")
    with _LOG:
        propagate, silent = logger.propagate, logging.NullHandler()
        logger.propagate = False
        logger.addHandler(silent)
        try:
            yield
        finally:
            logger.propagate = propagate
            logger.removeHandler(silent)


def _describe(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:200].rstrip(": ")


def _pages(count: int) -> str:
    return "1 page" if count == 1 else f"{count:,} pages"


def _listed(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers[:20])) + (f" and {len(numbers) - 20:,} more" if len(numbers) > 20 else "")
