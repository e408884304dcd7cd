"""The built-in calibration text."""

from __future__ import annotations

import pytest

from deepseek_optimizer.calibration.built_in import built_in_stretches, dialogues
from deepseek_optimizer.calibration.text import sample_text


class Bytes:
    """A tokenizer with one token per byte; its template, if any, is a function of the messages."""

    def __init__(self, template=None) -> None:
        self.chat_template = template

    def __call__(self, text: str, **kwargs: object) -> dict[str, list[int]]:
        return {"input_ids": list(text.encode())}

    def apply_chat_template(self, messages, tokenize: bool) -> str:
        assert not tokenize
        return self.chat_template(messages)


def text_of(tokenizer, **options) -> str:
    return bytes(token for part in built_in_stretches(tokenizer, **options) for token in part[0].tolist()).decode(
        errors="ignore"
    )


def test_dialogues_alternate_between_user_and_assistant() -> None:
    assert len(dialogues()) > 20
    for dialogue in dialogues():
        turns = [message["role"] for message in dialogue if message["role"] != "system"]
        assert turns == ["user", "assistant"] * (len(turns) // 2) and turns
        assert all(message["content"] and "USER:" not in message["content"] for message in dialogue)
    assert any("```python" in message["content"] for dialogue in dialogues() for message in dialogue)


def test_the_text_is_long_enough_and_always_the_same() -> None:
    parts = built_in_stretches(Bytes(), 100, 1000)
    assert len(parts) > 200 and {part.shape for part in parts} == {(1, 100)}
    text = text_of(Bytes(), length=100, count=1000)
    assert text == text_of(Bytes(), length=100, count=1000)
    assert "lighthouse" in text and "def merge_sorted" in text and "秋天" in text


def test_nothing_is_of_the_text_that_models_are_evaluated_on() -> None:
    """`dso bench --quality`, `dso prune` and the benchmarks measure on Python's documentation."""
    text = text_of(Bytes(), length=100, count=10_000)
    lines = [line.strip() for line in sample_text().splitlines() if len(line) > 40]
    assert len(lines) > 1000
    assert [line for line in lines if line in text] == []


def test_dialogues_are_in_the_chat_template() -> None:
    def marked(messages) -> str:
        return "".join(f"<{m['role']}>{m['content']}" for m in messages)

    def without_system(messages) -> str:
        if messages[0]["role"] == "system":
            raise ValueError("System role not supported")
        return marked(messages)

    def broken(messages) -> str:
        raise RuntimeError("no")

    assert "<system>You are a patient math tutor" in text_of(Bytes(marked), length=64, count=500)
    assert "<user>A train travels" in text_of(Bytes(without_system), length=64, count=500)
    for tokenizer in (Bytes(broken), Bytes()):
        assert "User: A train travels" in text_of(tokenizer, length=64, count=500)


@pytest.mark.parametrize("count", [1, 3])
def test_a_limit(count: int) -> None:
    assert len(built_in_stretches(Bytes(), 64, count)) == count
