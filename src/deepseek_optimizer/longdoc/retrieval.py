"""Finding the chunks that a question is about: BM25 over their words (bm25s), with no model and no network."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..errors import MissingPackageError
from .split import Chunk
from .words import words


class Index:
    """BM25 in Lucene's form (Kamphuis et al. 2020), k1 = 1.5, b = 0.75, which is computed when the index is made.

    Args:
        chunks: of a document.
        texts: theirs, in the same order.

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
        texts_ids = [self._known(text) for text in texts]
        self._scores = BM25(method="lucene")
        if self._ids:
            self._scores.index((texts_ids, self._ids), create_empty_token=False, show_progress=False)

    def search(self, question: str, k: int) -> list[tuple[int, float]]:
        """(index of the chunk, score) of the k best, the best first, of equals the earlier one.

        Chunks that have no word of the question are left out, so there may be fewer than k, or none.
        """
        known = sorted({self._ids[word] for word in words(question) if word in self._ids})
        if not known:
            return []
        scores = self._scores.get_scores(known)
        best = np.argsort(-scores, kind="stable")[: max(k, 0)]
        return [(self._chunks[i], float(scores[i])) for i in best if scores[i] > 0]

    def _known(self, text: str) -> list[int]:
        """Ids of a text's words; new ones become known."""
        ids = self._ids
        return [ids.setdefault(word, len(ids)) for word in words(text)]
