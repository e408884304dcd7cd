"""What strategies work on: a document in chunks, prompts for one model, and how much that model can take at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from .document import Document
from .prompts import Prompts
from .retrieval import Index
from .split import Chunk


@dataclass(frozen=True)
class Limits:
    """
    Attributes:
        room: tokens that prompt and reply may take together: of the model's context and of the cache, the smaller.
        window: tokens of the window that a document can be read through; None: there is no engine with one.
        reply: tokens of a reply at most.
        top: chunks that an answer is retrieved from at most.
        at_once: prompts that are handed to the engine at once.
    """

    room: int
    window: int | None = None
    reply: int = 512
    top: int = 4
    at_once: int = 32


@dataclass
class Material:
    """Made once for a document and asked many times.

    Attributes:
        document: what was read.
        chunks: of all its files, in order.
    """

    document: Document
    chunks: Sequence[Chunk]
    prompts: Prompts
    limits: Limits

    def text(self, chunk: Chunk) -> str:
        """A chunk's own characters."""
        return self.document.files[chunk.file].text[chunk.start : chunk.end]

    def place(self, chunk: Chunk) -> str:
        """Where a chunk begins, in words."""
        file = self.document.files[chunk.file]
        page = file.page_of(chunk.start)
        return f"{file.name}, page {page}" if page is not None else f"{file.name}, line {self._lines[chunk.index]}"

    @cached_property
    def index(self) -> Index:
        """For retrieval; made when it is first asked for."""
        return Index(self.chunks, [self.text(chunk) for chunk in self.chunks])

    @cached_property
    def tokens(self) -> int:
        """Of the whole document, each character once, about: by the chunks' own counts."""
        total, before = 0.0, (-1, 0)
        for chunk in self.chunks:
            shared = max(0, before[1] - chunk.start) if before[0] == chunk.file else 0
            total += chunk.tokens * (1 - shared / max(1, chunk.end - chunk.start))
            before = chunk.file, chunk.end
        return round(total)

    @cached_property
    def ids(self) -> list[int]:
        """Tokens of the whole document. Kept, so that each question on it has the same."""
        return self.prompts.document(self.document)

    @cached_property
    def _lines(self) -> list[int]:
        """The line that each chunk begins in: counted once, and not from the beginning for each."""
        found: list[int] = []
        file, at, line = -1, 0, 1
        for chunk in self.chunks:
            if chunk.file != file or chunk.start < at:
                file, at, line = chunk.file, 0, 1
            line += self.document.files[file].text.count("\n", at, chunk.start)
            at = chunk.start
            found.append(line)
        return found
