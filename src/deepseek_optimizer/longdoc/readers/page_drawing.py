"""Pages whose text is drawn, as shapes or in fonts that do not say which characters they have, and those with pictures that are
too large for pypdf: pypdfium2 renders them."""

from __future__ import annotations

from threading import Lock
from typing import Any

from ...chat.picture_job import MAX_RATIO
from ..recognized import PictureProblem

_DPI = 200
_MAX_PIXELS = 1 << 23  # of a rendered page: A4 has half of that
_PAINTING = frozenset((b"f", b"F", b"f*", b"B", b"B*", b"b", b"b*", b"S", b"s", b"sh", b"Tj", b"TJ", b"'", b'"'))
_OBJECTS = frozenset((b"Do", b"INLINE IMAGE"))  # show pictures and forms; the latter is pypdf's name
_PDFIUM = Lock()  # it is not for several threads


def is_drawn(page: Any, objects: bool = True) -> bool:
    """Whether a page of pypdf shows anything.

    Args:
        objects: whether pictures and forms count.
    """
    contents = page.get_contents()
    painting = _PAINTING | _OBJECTS if objects else _PAINTING
    return contents is not None and any(operator in painting for _, operator in contents.operations)


def rendered(data: bytes, number: int, why: str) -> Any:
    """A page of a PDF as a PIL image in RGB.

    Args:
        data: the content of the file.
        number: of the page, from 1.
        why: why it is rendered, for errors: a phrase to follow its place.

    Raises:
        PictureProblem: pypdfium2 is not installed or cannot render it, or the page is too narrow.
    """
    try:
        import pypdfium2
    except ImportError:
        raise PictureProblem(
            f'{why}, and pypdfium2, which renders it, is not installed: pip install "deepseek-optimizer[vision]"'
        ) from None
    with _PDFIUM:
        try:
            file = pypdfium2.PdfDocument(data)
            try:
                page = file[number - 1]
                width, height = page.get_size()  # in points
                if max(width, height) > MAX_RATIO * min(width, height):  # its picture would have more pixels than _MAX_PIXELS
                    raise PictureProblem(
                        f"has {width:,.4g} x {height:,.4g} points: one side is more than {MAX_RATIO} times the other; crop it"
                    )
                scale = min(_DPI / 72, (_MAX_PIXELS / max(1.0, width * height)) ** 0.5)
                return page.render(scale=scale).to_pil().convert("RGB")
            finally:
                file.close()
        except pypdfium2.PdfiumError as error:
            raise PictureProblem(f"cannot be rendered: {error}") from error
