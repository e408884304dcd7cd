"""PDF, using pypdf: the text of each page. Scanned pages are read by an OCR model, if one is given."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from io import BytesIO
from threading import Lock
from typing import Any

from ...errors import DeepSeekOptimizerError, DocumentError, MissingPackageError, RequestError
from ..document import TextFile
from ..recognized import PageLines, PictureProblem, RecognizedLine
from .builder import TextBuilder
from .page_drawing import is_drawn, rendered
from .page_images import REMEDY, pictures_of_page

_LOG = Lock()


def read(name: str, data: bytes, scanned: PageLines | None = None) -> TextFile:
    """
    Raises:
        DocumentError: it is damaged, needs a password, or contains only images.
        DeepSeekOptimizerError: the OCR model failed.
        MissingPackageError: pypdf is not installed.
    """
    with _pypdf(name):
        return _read(name, data, scanned)


def pictures(name: str, data: bytes, number: int) -> list[Any]:
    """See `readers.pictures_of_page`."""
    with _pypdf(name):
        page = _open(name, data).pages[number - 1]
        try:
            return _pictures(page, data, number)
        except (MemoryError, PictureProblem, DeepSeekOptimizerError):
            raise
        except Exception as error:  # a broken picture can make pypdf and Pillow raise anything
            raise PictureProblem(_describe(error)) from error


@contextmanager
def _pypdf(name: str) -> Iterator[None]:
    """Converts pypdf's errors for the body.

    Raises:
        DocumentError, MissingPackageError: see `read`.
    """
    try:
        from pypdf.errors import DependencyError, LimitReachedError
    except ImportError:
        raise MissingPackageError("reading PDF", "pypdf", "longdoc") from None
    try:
        with _quiet():
            yield
    except PictureProblem:
        raise
    except DeepSeekOptimizerError:
        raise
    except DependencyError:
        raise MissingPackageError(f"{name} is encrypted with AES; reading it", "cryptography", "longdoc") from None
    except LimitReachedError as error:
        raise DocumentError(name, f"exceeds a limit when unpacked ({error})") from error
    except Exception as error:  # a broken file can make pypdf raise anything
        raise DocumentError(name, f"is a damaged PDF ({_describe(error)}); try printing it to a new PDF") from error


def _open(name: str, data: bytes) -> Any:
    from pypdf import PdfReader

    if b"%PDF-" not in data[:1024]:
        raise DocumentError(name, "is not a PDF: it does not start with %PDF" if data else "is empty")
    reader = PdfReader(BytesIO(data))
    if reader.is_encrypted and not reader.decrypt(""):
        raise DocumentError(name, "is encrypted and needs a password; save a copy without one")
    return reader


def _read(name: str, data: bytes, scanned: PageLines | None) -> TextFile:
    reader = _open(name, data)
    builder = TextBuilder(name)
    empty, broken, recognized, unreadable = [], [], [], []
    for number, page in enumerate(reader.pages, 1):
        text = ""
        try:
            text = page.extract_text()
        except MemoryError:
            raise
        except Exception:  # as above, but other pages may be readable
            broken.append(number)
        if text.strip() or number in broken:
            builder.page(text, number)
            continue
        lines, problem = ([], "") if scanned is None else _recognized(page, data, number, scanned)
        builder.recognized_page(lines, number)
        if lines:
            recognized.append(number)
        elif problem:
            unreadable.append(f"{number} ({problem})")
        else:
            empty.append(number)
    pages = len(reader.pages)
    if len(empty) + len(unreadable) == pages:
        raise DocumentError(name, f"has no text on its {_pages(pages)}, {_why_none(scanned is None, unreadable)}")
    if len(broken) + len(empty) + len(unreadable) == pages:
        raise DocumentError(name, f"is a damaged PDF: none of its {_pages(pages)} can be read")
    if broken:
        builder.warnings.append(f"damaged pages that were left out: {_listed(broken)}")
    if recognized:
        builder.warnings.append(f"pages that the OCR model has read: {_listed(recognized)}")
    if unreadable:
        builder.warnings.append(f"pages whose pictures cannot be read: {_listed(unreadable)}")
    if empty:
        remedy = f"; {REMEDY}" if scanned is None else ""
        builder.warnings.append(f"pages without text (empty or images): {_listed(empty)}{remedy}")
    return builder.build()


def _pictures(page: Any, data: bytes, number: int) -> list[Any]:
    """The pictures of a page. The page as a picture if it shows something else, such as text drawn as shapes beside a logo, or
    a picture is too large for pypdf (75 MB when it is decoded, which scans of 600 dpi exceed)."""
    from pypdf.errors import LimitReachedError

    drawn = "draws its text"
    if is_drawn(page, objects=False):
        return [rendered(data, number, drawn)]
    try:
        pictures = pictures_of_page(page)
    except LimitReachedError:
        return [rendered(data, number, "has a picture that is too large for pypdf")]
    return pictures or [rendered(data, number, drawn)]  # a form without pictures


def _recognized(page: Any, data: bytes, number: int, scanned: PageLines) -> tuple[list[RecognizedLine], str]:
    """The text of a page's pictures, and why there is none, if a picture is the reason."""
    try:
        if not is_drawn(page):  # an empty page does not count as a scanned one
            return [], ""
        lines = scanned(number, lambda: _pictures(page, data, number))
    except (PictureProblem, RequestError) as error:
        return [], str(error)
    except (MemoryError, DeepSeekOptimizerError):
        raise
    except Exception as error:  # as above
        return [], _describe(error)
    return [line for line in lines if line.text.strip()], ""


def _why_none(not_read: bool, unreadable: list[str]) -> str:
    if not_read:
        return f"only images; {REMEDY}, or run text recognition (OCR) on it first"
    return (
        f"and the pictures of its pages cannot be read: {_listed(unreadable)}" if unreadable else "and the OCR model found none"
    )


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


def _listed(numbers: Sequence[int | str]) -> str:
    return ", ".join(map(str, numbers[:20])) + (f" and {len(numbers) - 20:,} more" if len(numbers) > 20 else "")
