"""Citations occur in the text, and support the answer."""

from __future__ import annotations

import random

import pytest

from deepseek_optimizer.calibration.text import sample_text
from deepseek_optimizer.longdoc import Chunk, Citation, Document, Page, TextFile, cite
from support.documents import random_text

TEXT = (
    "The tower was built in 1889. It is made of wrought iron.\n\n"
    "Its height is 330 metres, and it was the tallest building of the world until 1930. Gustave Eiffel signed the plans.\n\n"
    "The lift of the north pillar was renewed in 2014. It is made of steel."
)


def _chunks(text: str, size: int, shared: int = 0, file: int = 0) -> list[Chunk]:
    starts = range(0, max(len(text) - shared, 1), size - shared)
    return [Chunk(i, file, start, min(start + size, len(text)), 1) for i, start in enumerate(starts)]


def _cited(answer: str, question: str = "", text: str = TEXT, limit: int = 4) -> list[str]:
    return [one.text for one in cite(answer, _chunks(text, 10_000), Document.of_texts(text), question=question, limit=limit)]


def test_the_sentence_with_the_rare_words_of_the_answer() -> None:
    assert _cited("It is 330 metres high.")[0].startswith("Its height is 330 metres")
    assert _cited("Eiffel signed them.") == ["Gustave Eiffel signed the plans."]


def test_the_question_distinguishes_equal_sentences() -> None:
    assert _cited("It is made of steel.", "What is the lift made of?")[0] == "It is made of steel."
    text = "Alice has key 7731. " + "Bob sleeps all day. " * 20 + "Carol has key 7731."
    assert _cited("7731", "What key does Carol have?", text, limit=1) == ["Carol has key 7731."]


def test_quotations_come_first_and_exactly() -> None:
    actual = _cited('It was high: "the tallest building   of the world", made by Eiffel in 1889.')
    assert actual[0] == "the tallest building of the world"
    assert _cited("The text says “tallest … made of wrought iron.”")[0] == "made of wrought iron"
    assert _cited("TALLEST BUILDING OF THE WORLD UNTIL 1930")[0] == "tallest building of the world until 1930", (
        "also without quotation marks"
    )
    assert _cited("They call him 'Gustave'.")[0] == "Gustave Eiffel signed the plans.", "for a short quotation, its sentence"


def test_one_of_several_overlapping_quotations_is_cited() -> None:
    actual = _cited('"tallest building of the world" and "building of the world until 1930"', limit=2)
    assert actual[0] == "tallest building of the world" and all("until" not in text for text in actual)


def test_one_rare_word_counts_more_than_many_common_ones() -> None:
    text = "It is one of the many that are in it. " * 40 + "Number 4711 wins. " + "It is one of the many that are in it. " * 40
    assert "4711" in _cited("It is one of the many that are in it: 4711.", text=text, limit=1)[0]


def test_parts_of_an_answer_have_their_own_citations() -> None:
    actual = _cited("Built in 1889 of wrought iron, 330 metres high, with a lift renewed in 2014.")
    assert len(actual) == 3 and all(any(word in text for text in actual) for word in ("1889", "wrought", "330", "2014"))


def test_passages_are_cited_once() -> None:
    text = ("Nobody came. " * 40).join(("Key 7731 opens the red door. ", "Key 7731 opens a red door too. ", "Lamp 5 is off."))
    actual = _cited("Key 7731 opens the red door, lamp 5.", text=text, limit=2)
    assert "Key 7731" in actual[0] and "Lamp 5" in actual[1]


def test_the_passage_of_the_question_is_cited_for_any_answer() -> None:
    text = sample_text()[:200_000]
    at = text.index("\n\n", 100_000)
    needle = "\n\nOne of the special magic numbers for wandering-age is: 3428193."
    text = text[:at] + needle + text[at:]
    question = "What is the special magic number for wandering-age mentioned in the provided text?"
    rng = random.Random(0)
    for _ in range(5):
        noise = " ".join(rng.sample(text[:50_000].split(), 80))
        assert any("3428193" in one for one in _cited(noise, question, text))
    assert "3428193" in _cited("3428193", question, text)[0]


def test_nothing_matches() -> None:
    assert _cited("") == _cited("xylophone zebra") == _cited("?!") == []
    assert cite("iron", [], Document.of_texts(TEXT)) == cite("iron", _chunks(TEXT, 99), Document.of_texts(TEXT), limit=0) == []


def test_file_page_line_and_chunk() -> None:
    cut = TEXT.index("Gustave")
    line = TEXT.index("Its")
    pages = (Page(0, cut, 1), Page(cut, len(TEXT), 2))
    document = Document((TextFile("other.txt", "Nothing of it."), TextFile("tower.pdf", TEXT, pages)))
    chunks = [Chunk(0, 0, 0, 14, 4), Chunk(1, 1, 0, cut, 40), Chunk(2, 1, line, len(TEXT), 40)]
    (actual,) = cite("Eiffel signed them.", chunks, document)
    assert actual == Citation("tower.pdf", cut, cut + 32, "Gustave Eiffel signed the plans.", 2, 3, 2)
    assert cite("330 metres", chunks, document)[0].chunk == 1, "the first of the chunks that contain it"
    assert cite("Eiffel signed them.", chunks[:2], document) == [], "only passages that were in the prompt"


@pytest.mark.parametrize("limit", [1, 2, 4])
def test_citations_are_in_the_text_and_do_not_overlap(limit: int) -> None:
    rng = random.Random(limit)
    for _ in range(60):
        texts = {str(i): random_text(rng, rng.choice((10, 500, 4000))) for i in range(2)}
        document = Document.of_texts(texts)
        chunks = [c for i, file in enumerate(document.files) for c in _chunks(file.text, 700, 200, i)]
        chunks = [Chunk(i, c.file, c.start, c.end, 1) for i, c in enumerate(chunks)]
        shown = rng.sample(chunks, rng.randint(0, len(chunks)))
        start = rng.randrange(400)
        answer = rng.choice((random_text(rng, 300), f'"{texts["1"][start : start + 60]}"', texts["0"][:200]))
        question = random_text(rng, 50)
        actual = cite(answer, shown, document, question=question, limit=limit)
        assert actual == cite(answer, shown, document, question=question, limit=limit), "deterministic"
        for one in actual:
            file = next(file for file in document.files if file.name == one.file)
            chunk = chunks[one.chunk]
            assert one.text == file.text[one.start : one.end] and one.text.strip() == one.text != ""
            assert chunk in shown and document.files[chunk.file] is file and chunk.start <= one.start < one.end <= chunk.end
            assert one.line == file.line_of(one.start) and one.page is None
        spans = sorted((one.file, one.start, one.end) for one in actual)
        assert all(a[0] != b[0] or a[2] <= b[1] for a, b in zip(spans, spans[1:], strict=False))
        assert len(actual) <= limit


def test_a_line_of_a_megabyte() -> None:
    text = "word " * 100_000 + "needle 4711 " + "word " * 100_000
    (actual,) = _cited("4711", text=text, limit=1)
    assert "needle 4711" in actual and len(actual) <= 400
