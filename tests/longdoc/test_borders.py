"""Boundaries at which texts are cut, and sentences."""

from __future__ import annotations

import random

import pytest

from deepseek_optimizer.longdoc.borders import last_border, sentences
from support.documents import random_text


@pytest.mark.parametrize(
    "text, cut",
    [
        ("a b. c\nd\n\ne f. g\nh. i ", 10),
        ("a b. c\nd e. f ", 7),
        ("a b. c d? e ", 10),
        ("a b c d", 5),
        ("第一句。第二", 4),
        ("abcdef", 6),
        ("\n \t\n\nabc", 5),
    ],
)
def test_the_best_border(text: str, cut: int) -> None:
    assert last_border(text, (), 0, len(text)) == cut
    assert last_border(text, (2,), 0, len(text)) == 2, "a heading is preferred"
    assert last_border(text, (0,), 0, len(text)) == cut, "the boundary must be after the beginning"


def test_a_million_accents_on_one_letter_are_cut() -> None:
    text = "e" + "\u0301" * 1_000_000
    assert 0 < last_border(text, (), 0, 500_000) <= 500_000
    assert last_border("xe\u0301\u0323", (), 0, 3) == 1


def test_sentences() -> None:
    text = 'One. Two goes\nover a line! "Three?" Four\n\n- five\n- six\n2024 ERROR seven\n\n第八。第九。'
    assert [text[a:b] for a, b in sentences(text, 0, len(text), 400)] == [
        "One.", "Two goes\nover a line!", '"Three?"', "Four", "- five", "- six", "2024 ERROR seven", "第八。", "第九。",
    ]  # fmt: skip


def test_sentences_cover_all_text_but_white_space() -> None:
    rng = random.Random(3)
    for _ in range(100):
        text = random_text(rng, 3000)
        start = rng.randrange(1000)
        actual = sentences(text, start, 2500, 200)
        assert all(
            0 < end - begin <= 200 and not text[begin].isspace() and not text[end - 1].isspace() for begin, end in actual
        )
        assert all(before[1] <= after[0] for before, after in zip(actual, actual[1:], strict=False))
        assert "".join("".join(text[a:b].split()) for a, b in actual) == "".join(text[start:2500].split())
