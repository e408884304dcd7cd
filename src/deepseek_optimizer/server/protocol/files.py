"""/v1/files."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field

from ...errors import excerpt
from ..batches.file_store import REQUESTS, BatchFile
from ..documents.file_store import StoredFile
from ..http.problems import ApiError
from .base import ResponseModel

DOCUMENTS = ("user_data", "assistants")
PURPOSES = (*DOCUMENTS, REQUESTS)
_ANCHOR, _SECONDS = "expires_after[anchor]", "expires_after[seconds]"
MIN_SECONDS, MAX_SECONDS = 3600, 2_592_000  # OpenAI's limits


class FileObject(ResponseModel):
    """A stored file. It is deleted at `expires_at`, or when the server stops, except that files of batches stay in the server's
    state directory, if it has one."""

    id: str
    object: Literal["file"]
    bytes: int
    created_at: int
    expires_at: int
    filename: str
    purpose: Literal["user_data", "assistants", "batch", "batch_output"]
    status: Literal["processed"]
    characters: int | None = Field(description="Length of the text that was read from it. null for files of batches.")
    pages: int | None = Field(description="null if its format has no pages.")
    warnings: list[str] = Field(description="Parts that could not be read.")


class FileList(ResponseModel):
    """Files, newest first unless `order` is asc."""

    object: Literal["list"]
    data: list[FileObject]
    first_id: str | None
    last_id: str | None
    has_more: bool


class DeletedFile(ResponseModel):
    id: str
    object: Literal["file"]
    deleted: Literal[True]


def form(strict: bool) -> dict[str, Any]:
    """The form of an upload, for the OpenAPI schema; it is read as a stream, not by FastAPI.

    Args:
        strict: whether unknown fields are errors.
    """
    return {
        "requestBody": {
            "required": True,
            "content": {
                "multipart/form-data": {
                    "schema": {
                        "type": "object",
                        "required": ["file", "purpose"],
                        "additionalProperties": not strict,
                        "properties": {
                            "file": {"type": "string", "format": "binary", "minLength": 1},
                            "purpose": {"type": "string", "enum": list(PURPOSES)},
                            _ANCHOR: {"type": "string", "enum": ["created_at"]},
                            _SECONDS: {"type": "integer", "minimum": MIN_SECONDS, "maximum": MAX_SECONDS},
                        },
                    }
                }
            },
        }
    }


def unknown_fields(fields: Mapping[str, str]) -> list[str]:
    """The names of fields of an upload form that are not supported."""
    return [name for name in fields if name not in ("purpose", _ANCHOR, _SECONDS)]


def check_fields(fields: Mapping[str, str], strict: bool) -> tuple[str, float | None]:
    """Checks the fields of an upload form.

    Args:
        fields: of the form, without the file.
        strict: refuse unknown fields.

    Returns: the purpose, and the seconds after which the file expires; None: the server's default.

    Raises:
        ApiError: 400, a field is invalid or missing or, with `strict`, unknown.
    """
    if strict and (unknown := unknown_fields(fields)):
        raise ApiError(400, f"{excerpt(unknown[0])}: the field is not supported; leave it out", param=unknown[0])
    purpose = fields.get("purpose")
    if purpose not in PURPOSES:
        raise ApiError(400, f"purpose: must be {', '.join(PURPOSES[:-1])} or {PURPOSES[-1]}", param="purpose")
    if fields.get(_ANCHOR, "created_at") != "created_at":
        raise ApiError(400, f"{_ANCHOR}: must be created_at", param=_ANCHOR)
    given = fields.get(_SECONDS)
    if given is None:
        return purpose, None
    if not (given.isascii() and given.isdecimal() and len(given) < 10 and MIN_SECONDS <= int(given) <= MAX_SECONDS):
        raise ApiError(400, f"{_SECONDS}: must be an integer from {MIN_SECONDS} to {MAX_SECONDS}", param=_SECONDS)
    return purpose, float(given)


def file_object(file: StoredFile | BatchFile) -> dict[str, Any]:
    """A stored file as a `FileObject`."""
    if isinstance(file, BatchFile):
        return {
            "id": file.id, "object": "file", "bytes": file.size, "created_at": file.created, "expires_at": file.expires,
            "filename": file.name, "purpose": file.purpose, "status": "processed", "characters": None, "pages": None,
            "warnings": [],
        }  # fmt: skip
    text = file.text
    return {
        "id": file.id, "object": "file", "bytes": file.size, "created_at": file.created, "expires_at": file.expires,
        "filename": text.name, "purpose": file.purpose, "status": "processed", "characters": len(text.text),
        "pages": len(text.pages) or None, "warnings": list(text.warnings),
    }  # fmt: skip
