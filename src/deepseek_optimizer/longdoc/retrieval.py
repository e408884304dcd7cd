"""Retrieves the chunks relevant to a question: BM25 over their words (bm25s), without a model or network access."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..errors import MissingPackageError
from .split import Chunk
from .words import words


class Index:
    """BM25 as in Lucene (Kamphuis et al. 2020), k1 = 1.5, b = 0.75; scores are computed when the index is built.

    Args:
        chunks: of a document.
        texts: of the chunks, in the same order.

    Raises:
        MissingPackageError: bm25s is not installed.
    """

    def __init__(self, chunks: Sequence[Chunk], texts: Sequence[str]) -> None:
        try:
            from bm25s import BM25
        except ImportError:
            raise MissingPackageError("finding passages", "bm25s", "longdoc") from None
        self._chunks = [chunk.index for chunk in chunks]
        self._ids: dict[str, int] = {}
        texts_ids = [self._word_ids(text) for text in texts]
        self._scores = BM25(method="lucene")
        if self._ids:
            self._scores.index((texts_ids, self._ids), create_empty_token=False, show_progress=False)

    def search(self, question: str, k: int) -> list[tuple[int, float]]:
        """(index of the chunk, score) of the k best, best first; among equal scores the earlier chunk first.

        Chunks without any word of the question are left out, so there may be fewer than k, or none.
        """
        known = sorted({self._ids[word] for word in words(question) if word in self._ids})
        if not known:
            return []
        scores = self._scores.get_scores(known)
        best = np.argsort(-scores, kind="stable")[: max(k, 0)]
        return [(self._chunks[i], float(scores[i])) for i in best if scores[i] > 0]

    def _word_ids(self, text: str) -> list[int]:
        """Ids of a text's words; new words are added."""
        ids = self._ids
        return [ids.setdefault(word, len(ids)) for word in words(text)]
