"""Files in a chat's messages: they are looked up or read, and replaced by their texts."""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from ...longdoc.document import Document, TextFile
from ..documents.file_store import Room, memory_of
from ..documents.upload import digest_of, label, too_large
from ..http.caller import Caller
from ..http.problems import ApiError
from ..state import ServerState

MAX_FILES = 64  # in a chat
MAX_BEFORE = 2_000  # characters of earlier messages that accompany a question about a document that does not fit
_DATA = re.compile(r"data:[\w.+/-]*(?:;[\w=.+-]+)*;base64,", re.ASCII)

Message = Mapping[str, Any]


@dataclass(frozen=True)
class Attached:
    """The files of a chat.

    Attributes:
        document: all files, without duplicates.
        ids: of each file; None: it came with the request.
        digests: of each file.
        messages: the chat's messages, with the files' texts in place of the files.
        question: the text of the last user message.
        before: the system message and the end of the earlier messages, for prompts that do not contain `messages`.
        cut: whether `before` was truncated.
    """

    document: Document
    ids: tuple[str | None, ...]
    digests: tuple[str, ...]
    messages: list[dict[str, Any]]
    question: str
    before: str
    cut: bool


async def attached(state: ServerState, messages: Sequence[Message], owner: str, places: ExitStack, caller: Caller) -> Attached:
    """Collects the files of a chat, and reads those that came with the request.

    Args:
        state: the server's.
        messages: validated messages of OpenAI's chat API.
        owner: salt of the request's API key.
        places: the request's; when they are released, so is the memory of files that came with the request.
        caller: who sent the request.

    Raises:
        ApiError: 400, an invalid file, or no question; 404, a file that does not exist; 413, a file that is too large, or
            files that are too large in total; others: see `DocumentReader.read`.
        DocumentError: a file cannot be read.
        WorkerLostError: the process that read a file was killed by something else, twice.
    """
    files: dict[str, tuple[TextFile, str | None]] = {}  # digest -> file, its id
    inlined: list[dict[str, Any]] = []
    inline = _InlineFiles(state, owner, places, caller)
    for message in messages:
        texts: list[str] = []
        for part in _parts(message):
            if part["type"] != "file":
                continue
            if len(files) >= MAX_FILES:
                raise ApiError(400, f"messages: a chat may have at most {MAX_FILES} files", param="messages")
            id = part["file"].get("file_id")
            if id is not None:
                stored = state.files.get(owner, id)
                text, digest = stored.text, stored.digest
            else:
                text, digest = await inline.read(part["file"])
            if digest not in files:  # a duplicate is inserted once
                files[digest] = text, id
                texts.append(f"File: {text.name}\n{text.text}\n\n")
        inlined.append({**message, "content": "".join(texts) + _said(message)} if "content" in message else dict(message))
    last = max((i for i, message in enumerate(messages) if message["role"] == "user"), default=-1)
    question = _said(messages[last]).strip() if last >= 0 else ""
    if not question:
        raise ApiError(400, "messages: the last user message has a file but no question about it; add text", param="messages")
    before, cut = _before(messages[:last])
    document = Document(tuple(text for text, _ in files.values()))
    return Attached(document, tuple(id for _, id in files.values()), tuple(files), inlined, question, before, cut)


class _InlineFiles:
    """Files that came with a request. Their memory is counted until the request is answered."""

    def __init__(self, state: ServerState, owner: str, places: ExitStack, caller: Caller) -> None:
        self._state, self._owner, self._places, self._caller = state, owner, places, caller
        self._room: Room | None = None
        self._held = 0

    async def read(self, file: Mapping[str, Any]) -> tuple[TextFile, str]:
        """Reads a file; returns its text and digest."""
        name, data = _data_of(self._state, file)
        if self._room is None:
            self._room = self._places.enter_context(self._state.files.room(self._owner, self._caller.key))
        self._room.set(self._held + len(data))
        text = await self._state.reader.read(name, data, self._caller)
        self._held += memory_of(text)
        self._room.set(self._held)
        return text, digest_of(name, data)


def _parts(message: Message) -> list[Mapping[str, Any]]:
    content = message.get("content")
    return content if isinstance(content, list) else []


def _said(message: Message) -> str:
    """The text of a message, without files."""
    content = message.get("content") or ""
    return content if isinstance(content, str) else "\n".join(part["text"] for part in content if part["type"] != "file")


def _data_of(state: ServerState, file: Mapping[str, Any]) -> tuple[str, bytes]:
    """Name and content of a file that came with the request."""
    given = file.get("file_data")
    if given is None:
        raise ApiError(400, "file: give file_id, or file_data and filename", param="messages")
    head = _DATA.match(given)
    if given.startswith(("http:", "https:")):
        raise ApiError(400, "file_data: URLs are not fetched; send the file itself", param="file_data")
    try:
        data = base64.b64decode(given[head.end() if head else 0 :], validate=True)
    except (binascii.Error, ValueError):
        raise ApiError(400, "file_data: must be data:...;base64,... or base64", param="file_data") from None
    if len(data) > state.settings.max_file_bytes:
        raise too_large(state.settings)
    return label(file.get("filename") or "file"), data


def _before(messages: Sequence[Message]) -> tuple[str, bool]:
    """The messages before a question, as text, and whether they were truncated."""
    system = "\n".join(_said(message) for message in messages if message["role"] in ("system", "developer")).strip()
    names = {"user": "User", "assistant": "Assistant"}
    turns = "\n".join(
        f"{names[message['role']]}: {said}"
        for message in messages
        if message["role"] in names and (said := _said(message).strip())
    )
    cut = len(system) > MAX_BEFORE or len(turns) > MAX_BEFORE
    parts = [system[:MAX_BEFORE], f"What was said before:\n{turns[-MAX_BEFORE:]}" if turns else ""]
    return "\n\n".join(part for part in parts if part), cut
