"""Which passages support an answer: what it quotes, then the sentences that share its rare words. No model is asked."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from .borders import sentences
from .document import Document
from .quotes import LONG, places, quotes
from .split import Chunk
from .token_counts import pieces
from .words import words

MAX_SENTENCE = 400  # characters of a passage
MAX_COUNTED = 2 << 20  # characters of a document, spread over it, that tell how rare words are

_PIECE = 256  # characters, about a sentence or two, that a word counts once in
_QUESTION = 0.5  # weight of a word that only the question has
_PAIR = 0.8  # two sentences are cited where one alone has less than this part of what both have
_LEAST = 0.25  # part of the best passage's new words that another one must have


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

    First come places of what the answer quotes, word for word. Then passages of one or two sentences are taken one by one, each
    time the one that has most of the answer's words which no passage before had, weighed by how rare they are in the document
    (inverse document frequency). The passage that has most of the question's words is always among them if it has a third of
    them, by weight: so the place is shown that the question is about, whatever a weak model made of it.

    Args:
        answer: text; of JSON, pass the values and not the names of fields.
        chunks: those that the model was shown.
        question: what was asked; its words count less than the answer's, and tell passages apart that both have the answer.
        limit: passages at most.

    Returns:
        An empty list where no word of the answer or the question stands in any of the chunks.
    """
    wanted = set(words(answer)), set(words(question))
    passages = list(_passages(chunks, document, wanted[0] | wanted[1]))
    if not passages or limit <= 0:
        return []
    weights = _weights(document, wanted[0] | wanted[1])
    choice = _Choice(passages, weights, wanted[0], wanted[1], limit)
    spoken = [answer[start:end] for start, end in sentences(answer, 0, len(answer), MAX_SENTENCE)]
    for quote in quotes(answer, spoken):
        choice.quoted(quote, chunks, document)
    choice.by_words()
    return [_citation(passage, document) for passage in choice.chosen[:limit]]


@dataclass(frozen=True)
class _Passage:
    """Attributes:
    file, chunk: index of the file, and of the chunk.
    found: words of the answer or the question that it has.
    pair: it is two sentences.
    """

    file: int
    start: int
    end: int
    chunk: int
    found: frozenset[str]
    pair: bool = False

    def overlaps(self, other: _Passage) -> bool:
        return self.file == other.file and self.start < other.end and other.start < self.end


def _passages(chunks: Sequence[Chunk], document: Document, wanted: set[str]) -> Iterator[_Passage]:
    """Sentences of the chunks, and pairs of neighbours, that have a wanted word; once each where chunks share it."""
    seen: set[tuple[int, int, int]] = set()
    for chunk in chunks:
        text = document.files[chunk.file].text
        before: _Passage | None = None
        for start, end in sentences(text, chunk.start, chunk.end, MAX_SENTENCE):
            found = frozenset(wanted.intersection(words(text[start:end])))
            passage = _Passage(chunk.file, start, end, chunk.index, found)
            pair = None
            if before is not None and before.found and found and end - before.start <= MAX_SENTENCE:
                pair = _Passage(chunk.file, before.start, end, chunk.index, before.found | found, pair=True)
            for one in (passage, pair):
                if one is not None and one.found and (one.file, one.start, one.end) not in seen:
                    seen.add((one.file, one.start, one.end))
                    yield one
            before = passage


def _weights(document: Document, wanted: set[str]) -> dict[str, float]:
    """Inverse document frequency of words, over short pieces of the document."""
    step = document.characters // MAX_COUNTED + 1
    count, having = 0, Counter[str]()
    for file in document.files:
        for number, (start, end) in enumerate(pieces(file.text, _PIECE)):
            if number // 16 % step == 0:
                count += 1
                having.update(wanted.intersection(words(file.text[start:end])))
    return {word: math.log((count + 1) / (having[word] + 0.5)) for word in wanted}


class _Choice:
    """Passages that are taken one by one.

    Args:
        weights: of words.
        answer, question: their words.
    """

    def __init__(
        self, passages: list[_Passage], weights: dict[str, float], answer: set[str], question: set[str], limit: int
    ) -> None:
        self.chosen: list[_Passage] = []
        self._passages = passages
        self._rarity = weights
        self._weights = {word: weight * (1 if word in answer else _QUESTION) for word, weight in weights.items()}
        self._answer, self._question, self._limit = answer, question, limit
        self._starts: dict[tuple[int, int], list[_Passage]] = {}
        for passage in passages:
            if not passage.pair:
                self._starts.setdefault((passage.file, passage.chunk), []).append(passage)

    def quoted(self, quote: str, chunks: Sequence[Chunk], document: Document) -> None:
        """Takes the place of a quotation whose sentence has most of the answer's and the question's words."""
        best, score = None, 0.0
        for chunk in chunks:
            for start, end in places(quote, document.files[chunk.file].text, chunk.start, chunk.end):
                around = self._around(chunk, start)
                found = frozenset(words(quote)) & self._weights.keys()
                worth = self._sum(around.found if around else found)
                if worth > score:
                    long = end - start >= LONG
                    best = _Passage(chunk.file, start, end, chunk.index, found) if long or around is None else around
                    score = worth
        if best is not None:
            self._take(best)

    def by_words(self) -> None:
        """Fills up with the passages that add most."""
        about = self._about_question()
        most = 0.0
        while len(self.chosen) < self._limit:
            known = frozenset[str]().union(*(passage.found for passage in self.chosen))
            best = max(self._free(), key=lambda passage: self._worth(passage, known), default=None)
            worth = self._worth(best, known) if best is not None else 0.0
            most = max(most, worth)
            if best is None or worth <= 0 or (self.chosen and worth < _LEAST * most):
                break
            self._take(best)
        room = self._limit > 1 or not self.chosen
        if about is not None and room and not any(about.overlaps(passage) for passage in self.chosen):
            del self.chosen[self._limit - 1 :]
            self._take(about)

    def _about_question(self) -> _Passage | None:
        """The passage that has most of the question, if it has a third of what all have together."""
        asked = self._question & frozenset[str]().union(*(passage.found for passage in self._passages))
        whole = self._sum(asked, self._rarity)
        best = max(self._passages, key=lambda p: self._sum(p.found & asked, self._rarity) * (_PAIR if p.pair else 1))
        return best if asked and 3 * self._sum(best.found & asked, self._rarity) >= whole else None

    def _worth(self, passage: _Passage, known: frozenset[str]) -> float:
        return self._sum(passage.found - known) * (_PAIR if passage.pair else 1)

    def _sum(self, found: Iterable[str], weights: dict[str, float] | None = None) -> float:
        weights = self._weights if weights is None else weights
        return sum(weights[word] for word in sorted(found))  # in one order, so that equal sets are equal numbers

    def _free(self) -> Iterator[_Passage]:
        return (one for one in self._passages if not any(one.overlaps(other) for other in self.chosen))

    def _around(self, chunk: Chunk, place: int) -> _Passage | None:
        """The sentence of a chunk that a place is in."""
        sentences = self._starts.get((chunk.file, chunk.index), [])
        at = bisect_right(sentences, place, key=lambda passage: passage.start) - 1
        return sentences[at] if at >= 0 and place < sentences[at].end else None

    def _take(self, passage: _Passage) -> None:
        if not any(passage.overlaps(other) for other in self.chosen):
            self.chosen.append(passage)


def _citation(passage: _Passage, document: Document) -> Citation:
    file, start, end = document.files[passage.file], passage.start, passage.end
    return Citation(file.name, start, end, file.text[start:end], file.page_of(start), file.line_of(start), passage.chunk)
