"""Cache blocks in a file: round trips, and truncated, corrupted, swapped or foreign data is rejected."""

from __future__ import annotations

import json
import random

import pytest

from deepseek_optimizer.checkpoint import saved_blocks
from deepseek_optimizer.checkpoint.saved_blocks import open_blocks, save_blocks
from deepseek_optimizer.errors import CheckpointError

MADE_WITH = {"model": "a", "KV cache format": "bf16"}
TOKENS = list(range(5, 101))  # 3 blocks of 32
SIZE = 100


@pytest.fixture
def blocks():
    draw = random.Random(1)
    return [draw.randbytes(SIZE) for _ in range(3)]


@pytest.fixture
def file(tmp_path, blocks):
    path = tmp_path / "new" / "a.blocks"
    save_blocks(path, MADE_WITH, TOKENS, blocks, numbers=[0, 1, 2], block_tokens=32, block_bytes=SIZE)
    return path


def test_round_trip(file, blocks):
    saved = open_blocks(file)
    saved.check(MADE_WITH, 32, SIZE)
    assert saved.tokens == TOKENS and list(saved.blocks()) == blocks
    assert [p.name for p in file.parent.iterdir()] == [file.name]


def test_unneeded_blocks_are_skipped(tmp_path, blocks):
    save_blocks(tmp_path / "a", MADE_WITH, TOKENS, blocks[1:], numbers=[0, 2], block_tokens=32, block_bytes=SIZE)
    saved = open_blocks(tmp_path / "a")
    assert saved.numbers == [0, 2] and saved.tokens == TOKENS and list(saved.blocks()) == blocks[1:]


def test_any_flipped_bit_is_detected(file):
    whole = file.read_bytes()
    draw = random.Random(2)
    places = {*range(120), *draw.sample(range(len(whole)), 300), len(whole) - 1}
    for at in places:
        file.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << draw.randrange(8)]) + whole[at + 1 :])
        with pytest.raises(CheckpointError, match=str(file)):
            list(open_blocks(file).blocks())


def test_any_other_length_is_detected(file):
    whole = file.read_bytes()
    for length in (0, 7, 15, 16, 40, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:length])
        with pytest.raises(CheckpointError):
            open_blocks(file)
    file.write_bytes(whole + b"\0")
    with pytest.raises(CheckpointError, match="bytes instead of"):
        open_blocks(file)


def test_swapped_blocks_are_detected(file):
    whole, step = file.read_bytes(), 16 + SIZE
    first, second, third = whole[-3 * step : -2 * step], whole[-2 * step : -step], whole[-step:]
    file.write_bytes(whole[: -3 * step] + second + first + third)
    with pytest.raises(CheckpointError, match="block 0"):
        list(open_blocks(file).blocks())


@pytest.mark.parametrize(
    ("made_with", "sizes", "words"),
    [
        ({**MADE_WITH, "model": "b"}, (32, SIZE), "another model"),
        ({"model": "a", "KV cache format": "int8"}, (32, SIZE), "another KV cache format"),
        ({"model": "a"}, (32, SIZE), "another KV cache format"),
        ({**MADE_WITH, "weights": "x"}, (32, SIZE), "another weights"),
        (MADE_WITH, (32, SIZE + 1), "another block size"),
        (MADE_WITH, (16, SIZE), "another block size"),
    ],
)
def test_mismatched_settings_are_named(file, made_with, sizes, words):
    with pytest.raises(CheckpointError, match=words):
        open_blocks(file).check(made_with, *sizes)


def test_other_files_and_versions(file, monkeypatch):
    monkeypatch.setattr(saved_blocks, "_VERSION", 2)
    with pytest.raises(CheckpointError, match="version 1, but 2 is supported"):
        open_blocks(file)
    file.write_bytes(b"PK\x03\x04" + bytes(100))
    with pytest.raises(CheckpointError, match="not a file of saved cache blocks"):
        open_blocks(file)
    with pytest.raises(FileNotFoundError):
        open_blocks(file.with_name("missing"))


@pytest.mark.parametrize(
    "fields",
    [
        [],
        {},
        {"made_with": {}, "tokens": 96, "held": [[0, 3]], "block_tokens": 0, "block_bytes": SIZE},
        {"made_with": {}, "tokens": 96, "block_tokens": 32, "block_bytes": SIZE},
        *(
            {"made_with": {}, "tokens": 96, "held": held, "block_tokens": 32, "block_bytes": SIZE}
            for held in ([[0, 4]], [[2, 1]], [[1, 2], [0, 1]], [[0, 2], [1, 3]], [[0]], [0, 3], [[-1, 2]], [[0, True]], 3)
        ),
        {"made_with": {}, "tokens": -32, "held": [], "block_tokens": 32, "block_bytes": SIZE},
        {"made_with": {}, "tokens": 1 << 62, "held": [[0, 1 << 57]], "block_tokens": 32, "block_bytes": 1 << 62},
        {"made_with": 3, "tokens": 96, "held": [[0, 3]], "block_tokens": 32, "block_bytes": SIZE},
        {"made_with": {}, "tokens": True, "block_tokens": 32, "block_bytes": 1.5},
    ],
)
def test_false_headers(tmp_path, fields):
    header = json.dumps(fields).encode()
    file = tmp_path / "lie"
    file.write_bytes(saved_blocks._START.pack(b"DSOBLOCK", 1, len(header)) + header + bytes(1000))
    with pytest.raises(CheckpointError):
        open_blocks(file)


def test_a_failed_write_preserves_the_old_file(file, blocks):
    before = file.read_bytes()

    def broken():
        yield blocks[0]
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        save_blocks(file, MADE_WITH, TOKENS, broken(), numbers=[0, 1, 2], block_tokens=32, block_bytes=SIZE)
    with pytest.raises(ValueError, match="shorter"):
        save_blocks(file, MADE_WITH, TOKENS, blocks[:2], numbers=[0, 1, 2], block_tokens=32, block_bytes=SIZE)
    with pytest.raises(ValueError, match="block 3 of 96 tokens"):
        save_blocks(file, MADE_WITH, TOKENS, blocks[:1], numbers=[3], block_tokens=32, block_bytes=SIZE)
    assert file.read_bytes() == before and [p.name for p in file.parent.iterdir()] == [file.name]
