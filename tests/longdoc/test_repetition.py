"""Repetitive texts are recognized by their ends; others are not."""

from __future__ import annotations

import pytest

from deepseek_optimizer.longdoc.repetition import first_time


@pytest.mark.parametrize("unit", ["The command runs the tests.\n\n", "a\n", "é中 " * 20, "x" * 239 + "y"])
def test_repeated_text_is_kept_once(unit):
    begin = "An answer begins. "
    actual = first_time(begin + unit * 200)
    assert len(actual) <= len(begin) + 2 * len(unit) and (begin + unit * 200).startswith(actual)


def test_an_incomplete_repetition_at_the_end():
    text = "Begin: " + "round and round we go, my friend. " * 9 + "round and rou"
    actual = first_time(text)
    assert actual is not None and len(actual) < 90 and text.startswith(actual)


@pytest.mark.parametrize(
    "text",
    ["", "a", "-" * 100, "no no no no", "1, 2, 3, 4, 5, 6, 7", "the cat sat on the mat " * 3, " ".join(map(str, range(400)))],
)
def test_other_texts_are_unchanged(text):
    assert first_time(text) is None
