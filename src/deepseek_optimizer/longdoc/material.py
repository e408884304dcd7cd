"""The input of strategies: a document in chunks, the prompts of one model, and that model's limits."""

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
        room: maximum tokens of prompt and reply together: the model's context or the cache, whichever is smaller.
        window: tokens of the sliding window; None: no engine has one.
        reply: maximum tokens of a reply.
        top: maximum number of chunks that an answer is retrieved from.
        at_once: number of prompts submitted to the engine together.
    """

    room: int
    window: int | None = None
    reply: int = 512
    top: int = 4
    at_once: int = 32


@dataclass
class Material:
    """Constructed once per document and used for many questions.

    Attributes:
        document: the document.
        chunks: of all its files, in order.
    """

    document: Document
    chunks: Sequence[Chunk]
    prompts: Prompts
    limits: Limits

    def text(self, chunk: Chunk) -> str:
        """The text of a chunk."""
        return self.document.files[chunk.file].text[chunk.start : chunk.end]

    def place(self, chunk: Chunk) -> str:
        """The place where a chunk starts, as text."""
        file = self.document.files[chunk.file]
        page = file.page_of(chunk.start)
        return f"{file.name}, page {page}" if page is not None else f"{file.name}, line {self._lines[chunk.index]}"

    @cached_property
    def index(self) -> Index:
        """The retrieval index; built on first use."""
        return Index(self.chunks, [self.text(chunk) for chunk in self.chunks])

    @cached_property
    def tokens(self) -> int:
        """Approximate number of tokens of the whole document, from the counts of its chunks without their overlap."""
        total, before = 0.0, (-1, 0)
        for chunk in self.chunks:
            shared = max(0, before[1] - chunk.start) if before[0] == chunk.file else 0
            total += chunk.tokens * (1 - shared / max(1, chunk.end - chunk.start))
            before = chunk.file, chunk.end
        return round(total)

    @cached_property
    def ids(self) -> list[int]:
        """Token ids of the whole document, computed once, so that each question has the same prefix."""
        return self.prompts.document(self.document)

    @cached_property
    def _lines(self) -> list[int]:
        """The first line of each chunk, counted in one pass."""
        lines: list[int] = []
        file, at, line = -1, 0, 1
        for chunk in self.chunks:
            if chunk.file != file or chunk.start < at:
                file, at, line = chunk.file, 0, 1
            line += self.document.files[file].text.count("\n", at, chunk.start)
            at = chunk.start
            lines.append(line)
        return lines
