"""Passages that support an answer: those it quotes, then sentences that share its rare words. No model is involved."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from .borders import sentences
from .document import Box, Document
from .quotes import LONG, places, quotes
from .split import Chunk
from .token_counts import segments
from .words import words

MAX_SENTENCE = 400  # characters of a passage
MAX_COUNTED = 2 << 20  # characters of a document, sampled evenly, from which word frequencies are counted

_SEGMENT = 256  # characters, about one or two sentences: the unit of document frequency
_QUESTION = 0.5  # weight of words that occur only in the question
_PAIR = 0.8  # two sentences are cited together if each has less than this share of the weight of both
_MIN_SHARE = 0.25  # minimum weight of new words, relative to the best passage


@dataclass(frozen=True)
class Citation:
    """A passage of a document.

    Attributes:
        file: name of the file.
        start, end: characters of its extracted text.
        text: exactly those characters.
        page: page number from 1; None if the format has no pages.
        line: number of its first line, from 1.
        chunk: index of the chunk that contains it.
        box: left, top, right and bottom of its place on the page, from 0 to 1; None if it is unknown.
    """

    file: str
    start: int
    end: int
    text: str
    page: int | None
    line: int
    chunk: int
    box: Box | None = None


def cite(answer: str, chunks: Sequence[Chunk], document: Document, *, question: str = "", limit: int = 4) -> list[Citation]:
    """Passages that support an answer, best first, without overlaps.

    Verbatim quotations come first. Then passages of one or two sentences are chosen greedily: each time the one with the
    largest weight of answer words that no chosen passage contains, weighted by inverse document frequency. The passage with
    most of the question's words is always included if it has a third of their weight, so that the passage the question is
    about is cited even if a weak model answered badly.

    Args:
        answer: text; for JSON, the values without field names.
        chunks: the chunks that the model was shown.
        question: its words weigh less than those of the answer; they distinguish passages that both contain the answer.
        limit: maximum number of passages.

    Returns:
        An empty list if no word of the answer or the question occurs in any of the chunks.
    """
    wanted = set(words(answer)), set(words(question))
    passages = list(_passages(chunks, document, wanted[0] | wanted[1]))
    if not passages or limit <= 0:
        return []
    weights = _weights(document, wanted[0] | wanted[1])
    choice = _Choice(passages, weights, wanted[0], wanted[1], limit)
    answer_sentences = [answer[start:end] for start, end in sentences(answer, 0, len(answer), MAX_SENTENCE)]
    for quote in quotes(answer, answer_sentences):
        choice.quoted(quote, chunks, document)
    choice.by_words()
    return [_citation(passage, document) for passage in choice.chosen[:limit]]


@dataclass(frozen=True)
class _Passage:
    """Attributes:
    file, chunk: index of the file and of the chunk.
    matched: words of the answer or the question in it.
    pair: whether it consists of two sentences.
    """

    file: int
    start: int
    end: int
    chunk: int
    matched: frozenset[str]
    pair: bool = False

    def overlaps(self, other: _Passage) -> bool:
        return self.file == other.file and self.start < other.end and other.start < self.end


def _passages(chunks: Sequence[Chunk], document: Document, wanted: set[str]) -> Iterator[_Passage]:
    """Sentences of the chunks, and pairs of adjacent ones, that contain a wanted word; each once, also if chunks overlap."""
    seen: set[tuple[int, int, int]] = set()
    for chunk in chunks:
        text = document.files[chunk.file].text
        before: _Passage | None = None
        for start, end in sentences(text, chunk.start, chunk.end, MAX_SENTENCE):
            matched = frozenset(wanted.intersection(words(text[start:end])))
            passage = _Passage(chunk.file, start, end, chunk.index, matched)
            pair = None
            if before is not None and before.matched and matched and end - before.start <= MAX_SENTENCE:
                pair = _Passage(chunk.file, before.start, end, chunk.index, before.matched | matched, pair=True)
            for one in (passage, pair):
                if one is not None and one.matched and (one.file, one.start, one.end) not in seen:
                    seen.add((one.file, one.start, one.end))
                    yield one
            before = passage


def _weights(document: Document, wanted: set[str]) -> dict[str, float]:
    """Inverse document frequency of words, over short segments of the document."""
    step = document.characters // MAX_COUNTED + 1
    count, occurrences = 0, Counter[str]()
    for file in document.files:
        for number, (start, end) in enumerate(segments(file.text, _SEGMENT)):
            if number // 16 % step == 0:
                count += 1
                occurrences.update(wanted.intersection(words(file.text[start:end])))
    return {word: math.log((count + 1) / (occurrences[word] + 0.5)) for word in wanted}


class _Choice:
    """Chooses passages greedily.

    Args:
        weights: of words.
        answer, question: their words.
        limit: maximum number of passages.
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
        """Chooses the occurrence of a quotation whose sentence has the largest weight of matched words."""
        best, score = None, 0.0
        for chunk in chunks:
            for start, end in places(quote, document.files[chunk.file].text, chunk.start, chunk.end):
                around = self._around(chunk, start)
                matched = frozenset(words(quote)) & self._weights.keys()
                worth = self._sum(around.matched if around else matched)
                if worth > score:
                    long = end - start >= LONG
                    best = _Passage(chunk.file, start, end, chunk.index, matched) if long or around is None else around
                    score = worth
        if best is not None:
            self._take(best)

    def by_words(self) -> None:
        """Adds the passages with the largest weight of new words, up to the limit."""
        about = self._about_question()
        best_worth = 0.0
        while len(self.chosen) < self._limit:
            known = frozenset[str]().union(*(passage.matched for passage in self.chosen))
            best = max(self._free(), key=lambda passage: self._worth(passage, known), default=None)
            worth = self._worth(best, known) if best is not None else 0.0
            best_worth = max(best_worth, worth)
            if best is None or worth <= 0 or (self.chosen and worth < _MIN_SHARE * best_worth):
                break
            self._take(best)
        room = self._limit > 1 or not self.chosen
        if about is not None and room and not any(about.overlaps(passage) for passage in self.chosen):
            del self.chosen[self._limit - 1 :]
            self._take(about)

    def _about_question(self) -> _Passage | None:
        """The passage with most of the question's words, if it has a third of the weight of those in all passages."""
        present = self._question & frozenset[str]().union(*(passage.matched for passage in self._passages))
        whole = self._sum(present, self._rarity)
        best = max(self._passages, key=lambda p: self._sum(p.matched & present, self._rarity) * (_PAIR if p.pair else 1))
        return best if present and 3 * self._sum(best.matched & present, self._rarity) >= whole else None

    def _worth(self, passage: _Passage, known: frozenset[str]) -> float:
        return self._sum(passage.matched - known) * (_PAIR if passage.pair else 1)

    def _sum(self, matched: Iterable[str], weights: dict[str, float] | None = None) -> float:
        weights = self._weights if weights is None else weights
        return sum(weights[word] for word in sorted(matched))  # in a fixed order, so that equal sets have exactly equal sums

    def _free(self) -> Iterator[_Passage]:
        return (one for one in self._passages if not any(one.overlaps(other) for other in self.chosen))

    def _around(self, chunk: Chunk, place: int) -> _Passage | None:
        """The sentence of a chunk that contains a position."""
        sentences = self._starts.get((chunk.file, chunk.index), [])
        at = bisect_right(sentences, place, key=lambda passage: passage.start) - 1
        return sentences[at] if at >= 0 and place < sentences[at].end else None

    def _take(self, passage: _Passage) -> None:
        if not any(passage.overlaps(other) for other in self.chosen):
            self.chosen.append(passage)


def _citation(passage: _Passage, document: Document) -> Citation:
    file, start, end = document.files[passage.file], passage.start, passage.end
    page, line, box = file.page_of(start), file.line_of(start), file.box_of(start, end)
    return Citation(file.name, start, end, file.text[start:end], page, line, passage.chunk, box)
