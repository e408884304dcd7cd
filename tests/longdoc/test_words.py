"""Words in many scripts, identifiers, numbers."""

from __future__ import annotations

import pytest

from deepseek_optimizer.longdoc.words import words


@pytest.mark.parametrize(
    "text, expected",
    [
        ("The naïve Café's ÜBER straße", "the naive cafe s uber strasse"),
        ("max_length HTTPServer2 __init__ _", "max_length max length httpserver2 http server 2 __init__ init"),
        ("numbers loss bus this readFiles", "numbers number loss bus this readfiles readfile read files file"),
        ("1,000 3.14 v1.2 2024-01-05 10.0.0.1 12", "1,000 1000 3.14 v1 v 1 2 2024 01 05 10.0.0.1 12"),
        ("Привет ёж", "привет еж"),
        ("हिन्दी भाषा", "हिन्दी भाषा"),
        ("漢字と", "漢 字 と 漢字 字と"),
        ("GPT模型", "gpt 模 型 模型"),
        ("서울", "서 울 서울"),
        ("ｆｕｌｌ", "full"),
        ("don't well-known", "don t well known"),
        ("--- ...", ""),
    ],
)  # fmt: skip
def test_words(text: str, expected: str) -> None:
    assert list(words(text)) == expected.split()


def test_a_word_of_a_million_letters_is_split() -> None:
    assert {len(word) for word in words("x" * 1_000_000)} == {64}
    assert max(map(len, words("漢" * 1_000_000))) == 2


def test_case_and_accents_are_ignored() -> None:
    text = "Größe naïve ÉLÈVE Ёлка Άλφα İstanbul e\u0301 e\u0301\u0323 x"
    known = set(words(text))
    assert {"grosse", "naive", "eleve", "елка", "αλφα", "istanbul", "e", "x"} <= known
    assert set(words(text.upper())) == known
