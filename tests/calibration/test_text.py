"""The calibration text: excerpts spread over it, and files that are not text."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from deepseek_optimizer import ConfigError
from deepseek_optimizer.calibration import text


class Bytes:
    """A tokenizer with one token per byte."""

    def __call__(self, text: str, **kwargs: object) -> dict[str, list[int]]:
        return {"input_ids": list(text.encode())}


def test_excerpts_are_spread_evenly_over_the_text() -> None:
    written = "".join(chr(97 + i % 26) for i in range(10_007))
    actual = text.stretches(Bytes(), written, length=100, count=4)
    assert [(s.dtype, s.shape) for s in actual] == [(torch.int64, (1, 100))] * 4
    for first, stretch in zip((0, 2500, 5000, 7500), actual, strict=True):
        assert stretch[0].tolist() == list(written[first : first + 100].encode())
    assert len(text.stretches(Bytes(), written[:399], length=100, count=4)) == 3, "a shorter text is used whole"


def test_a_short_text_is_an_error() -> None:
    with pytest.raises(ConfigError, match="99 tokens.*at least 100"):
        text.stretches(Bytes(), "a" * 99, length=100)


def test_files_that_are_not_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="absent.txt cannot be read: No such file"):
        text.read_text(tmp_path / "absent.txt")
    with pytest.raises(ConfigError, match="cannot be read: Is a directory"):
        text.read_text(tmp_path)
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 noir")
    with pytest.raises(ConfigError, match=r"latin.txt is not UTF-8 text \(byte 3\)"):
        text.read_text(tmp_path / "latin.txt")
    (tmp_path / "good.txt").write_text("café", encoding="utf-8")
    assert text.read_text(tmp_path / "good.txt") == "café"
    monkeypatch.setattr(text, "MAX_BYTES", 4)
    with pytest.raises(ConfigError, match="larger than"):
        text.read_text(tmp_path / "good.txt")
