"""BM25 over chunks."""

from __future__ import annotations

import math
import random
import sys
from collections import Counter

import pytest

from deepseek_optimizer import MissingPackageError
from deepseek_optimizer.longdoc import Chunk, Index
from deepseek_optimizer.longdoc.words import words


def _index(texts: list[str], first: int = 0) -> Index:
    return Index([Chunk(first + i, 0, 0, len(text), 1) for i, text in enumerate(texts)], texts)


def test_scores_follow_the_formula() -> None:
    """Lucene's formula: idf = log(1 + (N - df + 0.5) / (df + 0.5)), tf / (tf + k1 (1 - b + b length / mean length))."""
    rng = random.Random(4)
    vocabulary = [f"word{i}" for i in range(30)]
    texts = [" ".join(rng.choices(vocabulary, k=rng.randint(1, 60))) for _ in range(40)]
    counts = [Counter(words(text)) for text in texts]
    mean = sum(map(Counter.total, counts)) / len(counts)
    index = _index(texts)
    for _ in range(20):
        question = " ".join(rng.choices([*vocabulary, "unknown", "?"], k=5))
        expected = []
        for i, count in enumerate(counts):
            score = 0.0
            for word in set(words(question)):
                having = sum(word in other for other in counts)
                idf = math.log(1 + (len(texts) - having + 0.5) / (having + 0.5))
                score += idf * count[word] / (count[word] + 1.5 * (0.25 + 0.75 * count.total() / mean))
            expected.append((i, score))
        expected = sorted((pair for pair in expected if pair[1] > 0), key=lambda pair: (-round(pair[1], 4), pair[0]))[:7]
        actual = index.search(question, 7)
        assert [round(score, 3) for _, score in actual] == [round(score, 3) for _, score in expected]
        assert {i for i, _ in actual[:3]} == {i for i, _ in expected[:3]} or len({round(s, 3) for _, s in expected[:4]}) < 4


def test_ties_are_in_the_order_of_the_text() -> None:
    index = _index(["nothing here", "the needle lies here"] * 4, first=10)
    actual = index.search("Where does the NEEDLE lie?", 3)
    assert [i for i, _ in index.search("needle", 8)] == [11, 13, 15, 17], "only chunks with a word of the query"
    assert [i for i, _ in actual] == [11, 13, 15] and len({score for _, score in actual}) == 1


@pytest.mark.parametrize("texts", [[], ["", "  "], ["one two"], ["other words", "and more"]])
def test_words_that_occur_nowhere(texts: list[str]) -> None:
    index = _index(texts)
    assert index.search("unknown things, and nobody says these?".replace("and", ""), 5) == []
    assert index.search("", 5) == [] and index.search("one", 0) == []


def test_a_needle_among_ten_thousand_chunks() -> None:
    rng = random.Random(2)
    vocabulary = [f"w{i}" for i in range(3000)]
    texts = [" ".join(rng.choices(vocabulary, k=20)) for _ in range(10_000)]
    texts[7321] += " The special number of wandering-age is 3428193."
    assert _index(texts).search("What is the special number of wandering-age?", 4)[0][0] == 7321


def test_without_bm25s(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bm25s", None)
    with pytest.raises(MissingPackageError, match=r"bm25s, .*deepseek-optimizer\[longdoc\]"):
        _index(["a"])
