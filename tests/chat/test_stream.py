"""Streamed chunks concatenate to the whole text, even if a token ends inside a character."""

from __future__ import annotations

import pytest
import torch

from deepseek_optimizer.chat.stream import TextStream, write_now


def _stream(tokenizer, ids, group=1):
    pieces: list[str] = []
    stream = TextStream(tokenizer, pieces.append)
    stream.put(torch.tensor([[1, 2, 3]]))  # the prompt
    for i in range(0, len(ids), group):
        stream.put(torch.tensor(ids[i : i + group]))
    stream.end()
    return stream, pieces


@pytest.mark.parametrize("group", [1, 3])
@pytest.mark.parametrize(
    "text", ["Paris.", " leading", "naïve café", "深度学习", "a👩‍👩‍👧b🇫🇷", "line\n\n  indented\n", "क्षत्रिय"]
)
def test_chunks_concatenate_to_the_text(byte_tokenizer, text, group):
    ids = byte_tokenizer(text)["input_ids"]
    stream, pieces = _stream(byte_tokenizer, ids, group=group)
    assert "".join(pieces) == stream.text == text
    assert not any("\ufffd" in piece for piece in pieces)
    assert stream.ids == ids and len(stream.times) == len(ids)


def test_characters_are_emitted_once_complete(byte_tokenizer):
    _, pieces = _stream(byte_tokenizer, byte_tokenizer("a👩b")["input_ids"])
    assert pieces == ["a", "👩", "b"]


def test_an_incomplete_character_is_emitted_at_the_end(byte_tokenizer):
    ids = byte_tokenizer("x👩")["input_ids"][:-1]
    stream, pieces = _stream(byte_tokenizer, ids)
    assert pieces[0] == "x" and set("".join(pieces[1:])) == {"\ufffd"}
    assert stream.text == byte_tokenizer.decode(ids)


def test_special_tokens_are_not_text(byte_tokenizer):
    stream, pieces = _stream(byte_tokenizer, [*byte_tokenizer("ok")["input_ids"], byte_tokenizer.eos_token_id])
    assert "".join(pieces) == "ok" and stream.ids[-1] == byte_tokenizer.eos_token_id


@pytest.mark.parametrize(("terminal", "shown"), [(True, "a[31mb\t\n"), (False, "a\x1b[31mb\t\n")])
def test_control_sequences_do_not_reach_the_terminal(capsys, monkeypatch, terminal, shown):
    monkeypatch.setattr("sys.stdout.isatty", lambda: terminal)
    write_now("a\x1b[31mb\t\n")
    assert capsys.readouterr().out == shown
