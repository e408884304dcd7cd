"""Which passages support an answer: what it quotes, then the sentences that share its rare words. No model is asked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .document import Document
from .split import Chunk


@dataclass(frozen=True)
class Citation:
    """A passage of a document.

    Attributes:
        file: name of the file.
        start, end: characters of its extracted text.
        text: exactly those characters.
        page: its number from 1; None where the format has no pages.
        line: number of its first line, from 1.
        chunk: index of the chunk that was shown.
    """

    file: str
    start: int
    end: int
    text: str
    page: int | None
    line: int
    chunk: int


def cite(answer: str, chunks: Sequence[Chunk], document: Document, *, question: str = "", limit: int = 4) -> list[Citation]:
    """Passages that support an answer, the best first; none overlaps another.

    Args:
        chunks: those that the model was shown, the best first.
        question: what was asked; its words count less than the answer's, and tell passages apart that both have the answer.
        limit: passages at most.

    Returns:
        An empty list where no word of the answer or the question that tells anything stands in any of the chunks.
    """
    raise NotImplementedError
