"""Stores a document as it was read, as JSON with a checksum, so that positions stay valid if the original files change."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from .document import Document, Page, Problem, TextBox, TextFile

_VERSION = 1


def store(path: Path, document: Document, options: dict[str, Any]) -> None:
    """Writes a document and the options it was split with."""
    files = [
        {
            "name": f.name,
            "text": f.text,
            "pages": f.pages,
            "headings": f.headings,
            "warnings": f.warnings,
            "boxes": f.boxes,
        }  # fmt: skip
        for f in document.files
    ]
    body = json.dumps({"files": files, "problems": document.problems, "options": options})
    path.write_text(json.dumps({"version": _VERSION, "checksum": _checksum(body), "body": body}), encoding="utf-8")


def restore(path: Path) -> tuple[Document, dict[str, Any]]:
    """Reads what `store` wrote.

    Raises:
        CheckpointError: the file is missing, damaged or of another version.
    """
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        version, checksum, body = stored["version"], stored["checksum"], stored["body"]
    except FileNotFoundError:
        raise CheckpointError("does not exist; give a directory that LongDocument.save has written", file=path) from None
    except (ValueError, KeyError, TypeError, RecursionError):
        raise CheckpointError("is not a saved document, or it is damaged", file=path) from None
    if version != _VERSION:
        raise CheckpointError(
            f"has version {version}, but this package reads version {_VERSION}; read the original files again", file=path
        )
    if not isinstance(body, str) or _checksum(body) != checksum:
        raise CheckpointError("is damaged; read the original files again", file=path)
    fields = json.loads(body)
    files = tuple(
        TextFile(
            f["name"],
            f["text"],
            tuple(Page(*page) for page in f["pages"]),
            tuple(f["headings"]),
            tuple(f["warnings"]),
            tuple(TextBox(start, end, tuple(box)) for start, end, box in f.get("boxes", ())),  # missing in older files
        )
        for f in fields["files"]
    )
    return Document(files, tuple(Problem(*problem) for problem in fields["problems"])), fields["options"]


def _checksum(body: str) -> str:
    return hashlib.blake2b(body.encode(), digest_size=16).hexdigest()
