"""Finding the chunks that a question is about: BM25 over their words (bm25s), with no model and no network."""

from __future__ import annotations

from collections.abc import Sequence

from .split import Chunk


class Index:
    """
    Args:
        chunks: of a document.
        texts: theirs, in the same order.

    Raises:
        MissingPackageError: bm25s is not installed.
    """

    def __init__(self, chunks: Sequence[Chunk], texts: Sequence[str]) -> None:
        raise NotImplementedError

    def search(self, question: str, k: int) -> list[tuple[int, float]]:
        """(index of the chunk, score) of the k best, the best first, of equals the earlier one.

        Chunks that have no word of the question are left out, so there may be fewer than k, or none.
        """
        raise NotImplementedError
