"""Reads uploaded files in a worker process (see `system.sandbox.worker`), since a PDF can be crafted to take forever.

The OCR model is not in that process. If one is used, a file is read once to find its scanned pages, their pictures are fetched
page by page, and the file is read again with the lines that the model has found.
"""

from __future__ import annotations

import base64
import importlib.util
import sys
from collections.abc import Callable
from typing import Any


def prepare(setup: dict[str, Any]) -> Callable[[dict[str, Any]], Any]:
    """Returns the worker's function; see `system.sandbox.worker.Worker`.

    Args:
        setup: {"package": this package's name, "max_characters": of the text of a file, "max_pixels": of the pictures of a
            page together, beyond which they are scaled down}.
    """
    # The package without its __init__, which would load torch.
    spec = importlib.util.find_spec(setup["package"])
    assert spec is not None
    sys.modules[setup["package"]] = importlib.util.module_from_spec(spec)
    errors = importlib.import_module(f"{setup['package']}.errors")
    readers = importlib.import_module(f"{setup['package']}.longdoc.readers")
    recognized = importlib.import_module(f"{setup['package']}.longdoc.recognized")

    def read(name: str, data: bytes, ocr: dict[str, Any] | None) -> dict[str, Any]:
        """
        Args:
            ocr: None: scanned pages are not read; otherwise "pages": the lines or the problems of those that are known.
        """
        unknown: list[int] = []

        def scanned(number: int, _: Any) -> Any:
            found = ocr["pages"].get(str(number)) if ocr is not None else None
            if found is None:
                unknown.append(number)
                return []
            if "problem" in found:
                raise recognized.PictureProblem(found["problem"])
            return [recognized.RecognizedLine(text, box and tuple(box)) for text, box in found["lines"]]

        try:
            file = readers.read_with(name, data, None if ocr is None else scanned)
        except errors.DocumentError as error:
            return {"scanned": unknown} if unknown else {"problem": error.message}
        if unknown:
            return {"scanned": unknown}
        if len(file.text) > setup["max_characters"]:
            size, limit = len(file.text), setup["max_characters"]
            return {"problem": f"has {size:,} characters of text, but at most {limit:,} are allowed; send a part of it"}
        return {
            "text": file.text, "pages": file.pages, "headings": file.headings, "warnings": file.warnings, "boxes": file.boxes,
        }  # fmt: skip

    def pictures(name: str, data: bytes, number: int) -> dict[str, Any]:
        """The pictures of a page, scaled down together if they have too many pixels."""
        try:
            images = readers.pictures_of_page(name, data, number)
        except recognized.PictureProblem as error:
            return {"problem": str(error)}
        pixels = sum(image.width * image.height for image in images)
        scale = min(1.0, (setup["max_pixels"] / max(1, pixels)) ** 0.5)
        if scale < 1.0:
            images = [image.resize((_scaled(image.width, scale), _scaled(image.height, scale))) for image in images]
        return {
            "pictures": [(image.width, image.height, base64.b64encode(image.tobytes()).decode()) for image in images]
        }  # fmt: skip

    def run(payload: dict[str, Any]) -> dict[str, Any]:
        name, data = payload["name"], base64.b64decode(payload["data"])
        try:
            return pictures(name, data, payload["page"]) if "page" in payload else read(name, data, payload["ocr"])
        except errors.DocumentError as error:
            return {"problem": error.message}
        except errors.MissingPackageError as error:
            return {"missing": str(error)}

    return run


def _scaled(pixels: int, scale: float) -> int:
    return max(1, int(pixels * scale))
