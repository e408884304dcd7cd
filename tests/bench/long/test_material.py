"""Names and values that are drawn are unique and do not occur in the filler prose."""

from __future__ import annotations

import random
import re
from itertools import islice

import pytest

from deepseek_optimizer.bench.long.material import Filler, made_up, names, numbers, paragraphs, variables


@pytest.mark.parametrize("kind", [made_up, names, numbers, variables])
def test_values_are_drawn_without_replacement(kind):
    drawn = list(islice(kind(random.Random(0)), 20_000))
    assert len({text.lower() for text in drawn}) == 20_000


def test_prose_has_no_made_up_words():
    prose = set(re.findall(r"[a-z]+", " ".join(" ".join(words) for words in paragraphs()).lower()))
    drawn = set(islice(made_up(random.Random(0), syllables=1), 1000))
    assert {"list", "not", "set"} <= prose and not drawn & prose  # of which one syllable would make some


def test_prose_is_long_enough_and_has_no_numbers():
    words = [word for paragraph in paragraphs() for word in paragraph]
    assert len(words) > 5000 and not re.search(r"\d", " ".join(words))


def test_filler_continues_in_another_order():
    filler, whole = Filler(random.Random(0)), sum(map(len, paragraphs()))
    words = filler.words(2 * whole)
    assert sorted(words[:whole]) == sorted(words[whole:]) and words[:whole] != words[whole:]
    assert filler.words(100) == words[:100]
