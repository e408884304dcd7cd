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
        window: tokens of the window that a document can be read through; None: there is no such engine.
        reply: tokens of a reply at most.
        top: chunks that an answer is retrieved from at most.
        at_once: prompts that are handed to the engine at once.
    """

    room: int
    window: int | None = None
    reply: int = 512
    top: int = 4
    at_once: int = 32


@dataclass(frozen=True)
class Material:
    """
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

    @cached_property
    def index(self) -> Index:
        """For retrieval; made when it is first asked for."""
        return Index(self.chunks, [self.text(chunk) for chunk in self.chunks])

    @cached_property
    def tokens(self) -> int:
        """Of the whole document, every character once, about."""
        return self.prompts.document_tokens(self.document)
