"""Text: encodings, damaged files, and files that are not text."""

from __future__ import annotations

import random

import pytest

from deepseek_optimizer import DocumentError
from deepseek_optimizer.longdoc import read_upload

RUSSIAN = (
    "Съешь же ещё этих мягких французских булок, да выпей чаю. В чащах юга жил бы цитрус? Да, но фальшивый экземпляр! " * 5
)
JAPANESE = (
    "吾輩は猫である。名前はまだ無い。どこで生れたかとんと見当がつかぬ。何でも薄暗いじめじめした所でニャーニャー泣いていた。" * 5
)
FRENCH = "Portez ce vieux whisky au juge blond qui fume. L'élève a reçu une leçon sur l'île, où il était déjà allé. " * 5


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("text", [RUSSIAN, "a\nb 🙂"])
def test_marked_or_utf8(encoding: str, text: str) -> None:
    file = read_upload("a.txt", text.encode(encoding))
    assert file.text == text and not file.warnings


def test_utf16_without_a_mark() -> None:
    for encoding in ("utf-16-le", "utf-16-be"):
        file = read_upload("a.txt", FRENCH.encode(encoding))
        assert file.text == FRENCH
        assert file.warnings == (f"read as {encoding}, a guess, since there is no byte order mark",)


@pytest.mark.parametrize(
    "text, encoding",
    [(RUSSIAN, "cp1251"), (RUSSIAN, "koi8-r"), (JAPANESE, "shift_jis"), (JAPANESE, "euc-jp"), (FRENCH, "cp1252")],
)
def test_other_encodings_are_guessed_and_reported(text: str, encoding: str) -> None:
    file = read_upload("a.txt", text.encode(encoding))
    assert file.text == text
    assert len(file.warnings) == 1 and file.warnings[0].startswith("not UTF-8: read as ") and "a guess" in file.warnings[0]


def test_a_few_accents_are_western() -> None:
    for text in ("Übergröße ist lieferbar", "Señor Núñez ha llegado"):  # charset-normalizer alone detects the first as Chinese
        assert read_upload("a.log", text.encode("latin-1")).text == text


def test_mixed_encodings_keep_utf8_and_report_the_rest() -> None:
    good, bad = "Zeile mit Müller und Übergröße\n", "Zeile mit Müller\n"
    file = read_upload("a.log", (good * 3).encode() + bad.encode("latin-1") + (good * 3).encode())
    assert file.text == good * 3 + "Zeile mit M\ufffdller\n" + good * 3
    assert file.warnings == ("1 invalid sequences in UTF-8 were replaced by U+FFFD, the first in line 4",)


def test_line_endings_are_normalized() -> None:
    assert read_upload("a.txt", b"one\r\ntwo\rthree\n").text == "one\ntwo\nthree\n"


@pytest.mark.parametrize("data", [bytes(range(256)) * 40, random.Random(1).randbytes(50_000), b"text\0with\0zeros" * 9])
def test_binary_files(data: bytes) -> None:
    with pytest.raises(DocumentError, match="^a.txt: is (a binary file, )?not text"):
        read_upload("a.txt", data)


def test_random_bytes_without_zeros_are_not_text() -> None:
    data = bytes(byte or 1 for byte in random.Random(2).randbytes(20_000))
    with pytest.raises(DocumentError, match="^a: is not text"):
        read_upload("a", data)


def test_a_log_with_zeros_from_a_crash() -> None:
    file = read_upload("a.log", b"a line of a log\n" * 1000 + b"\0" * 50 + b"\nand on\n")
    assert "\0" not in file.text and file.warnings == ("50 NUL characters were replaced by U+FFFD",)
    with pytest.raises(DocumentError, match="is not text: it contains 16,000 NUL characters"):
        read_upload("a.log", b"a line of a log\n" * 1000 + b"\0" * 16_000)


def test_a_line_of_50_mb_of_another_encoding() -> None:
    """Processing lines or all bytes several times would take minutes."""
    file = read_upload("a.txt", b"x" * 25_000_000 + b"\xe9t\xe9" + b"x" * 25_000_000)
    assert file.text[25_000_000:25_000_003] == "été"


def test_headings_of_markdown_and_source() -> None:
    markdown = "Title\n=====\n\n# One\n\ntext\n\n```\n# no heading\n```\n\nTwo\n---\n\n---\n   ### Three\n####no\n"
    file = read_upload("a.md", markdown.encode())
    assert [file.text[at:].split("\n")[0] for at in file.headings] == ["Title", "# One", "Two", "   ### Three"]
    source = "import a\n\n\ndef f():\n    x = 1\n\n    return x\n\n}\n\n# On g.\ndef g(): ...\n"
    file = read_upload("a.py", source.encode())
    assert [file.text[at:].split("\n")[0] for at in file.headings] == ["def f():", "# On g."]
    assert read_upload("a.txt", markdown.encode()).headings == ()
