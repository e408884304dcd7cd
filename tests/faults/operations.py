"""The operations that are tested with faults: all that write persistent files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer
from typer.testing import CliRunner

from deepseek_optimizer import LongDocument, load_model
from deepseek_optimizer.chat.conversation import Conversation
from deepseek_optimizer.checkpoint.saved_blocks import save_blocks
from deepseek_optimizer.errors import CheckpointError
from deepseek_optimizer.integration.load.pack_checkpoint import pack_checkpoint
from deepseek_optimizer.train.checkpoints.directory import checkpoints
from deepseek_optimizer.train.checkpoints.manifest import verify
from deepseek_optimizer_cli.app import app
from support.fault_points import Operation, State
from support.long_documents import prose
from support.train_runs import tiny_trainer

_OLD, _NEW = prose(4), prose(6)
_WITH_TIMES = r"(trainer_state|checkpoint|loss)\.json$|\.png$"
_DOCUMENT = {"max_length": 512, "stride": 64, "max_tokens": 2}


def operations(model: Path) -> dict[str, Operation]:
    """The operations by name.

    Args:
        model: a float model with its tokenizer, which is only read.
    """

    def dso(*arguments: object) -> tuple[int, str]:
        result = CliRunner().invoke(app, [str(a) for a in arguments])
        unexpected = result.exception is not None and not isinstance(result.exception, SystemExit)
        return result.exit_code, result.stderr + (f"\nTraceback: {result.exception!r}" if unexpected else "")

    def convert(folder: Path, precision: str = "int8") -> tuple[int, str]:
        return dso("convert", model, folder / "out", "--precision", precision, "--force")

    def save(folder: Path, precision: str = "int8") -> None:
        load_model(model, precision=precision, backend="reference").save_pretrained(folder / "out")

    def convert_before(folder: Path) -> None:
        assert convert(folder, "int4")[0] == 0

    def tokenizer() -> Any:
        return AutoTokenizer.from_pretrained(model)

    def save_before(folder: Path) -> None:
        save(folder, "int4")
        tokenizer().save_pretrained(folder / "out")
        (folder / "out" / "notes").mkdir()
        (folder / "out" / "notes" / "README.md").write_text("mine")

    def shards(folder: Path) -> None:
        pack_checkpoint(model, folder / "out", {"precision": "int8", "backend": "reference"}, overwrite=True, shard_bytes=1)

    def document(folder: Path, text: str = _NEW) -> None:
        with LongDocument(load_model(model, backend="reference"), tokenizer(), text, **_DOCUMENT) as made:
            made.ask("What is it?", strategy="whole")
            made.save(folder / "document", overwrite=True)

    def document_cache(folder: Path) -> None:
        loaded = load_model(model, backend="reference")
        with LongDocument(loaded, tokenizer(), _NEW, cache_dir=folder / "cache", **_DOCUMENT) as made:
            answer = made.ask("What is it?", strategy="whole")
        if notes := [note for note in answer.notes if "could not be saved" in note]:  # the answer is valid without it
            raise OSError(notes[0])

    def chats(folder: Path) -> None:
        turns = [[{"role": "user", "content": f"count {i}"}, {"role": "assistant", "content": "one two"}] for i in range(8)]
        (folder / "chats.jsonl").write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in turns))

    def train_command(folder: Path) -> tuple[int, str]:
        return dso(
            "train", "--model", model, "--data", folder / "chats.jsonl", "--output", folder / "run", "--max-length", "64",
            "--steps", "2", "--set", "save_steps=1", *(["--resume"] if (folder / "run").is_dir() else []),
        )  # fmt: skip

    return {
        "convert": Operation(convert_before, convert, resumes=True),
        "convert to a new directory": Operation(lambda folder: None, convert, resumes=True),
        "convert to shards": Operation(convert_before, shards, resumes=True),
        "save_pretrained": Operation(save_before, save),
        "save_pretrained to a new directory": Operation(lambda folder: None, save),
        "training": Operation(lambda folder: _train(folder, 2), lambda folder: _train(folder, 4), whole=_checkpoints_are_whole),
        "dso train": Operation(chats, train_command, whole=_checkpoints_are_whole, varies=_WITH_TIMES),
        "document": Operation(lambda folder: document(folder, _OLD), document),
        "document cache": Operation(lambda folder: None, document_cache),
        "saved blocks": Operation(lambda folder: _save_blocks(folder, 3), lambda folder: _save_blocks(folder, 5)),
        "in place": Operation(lambda folder: _in_place(folder, "old"), lambda folder: _in_place(folder, "new")),
        "conversation": Operation(lambda folder: _talk(folder, "old"), lambda folder: _talk(folder, "new")),
    }


def _train(folder: Path, steps: int) -> None:
    run = folder / "run"
    tiny_trainer(run, max_steps=steps, save_total_limit=1).train(resume_from_checkpoint=bool(checkpoints(run)))


def _save_blocks(folder: Path, count: int) -> None:
    blocks = (bytes([i]) * 5000 for i in range(count))
    numbers = list(range(count))
    save_blocks(folder / "x.blocks", {}, [7] * count, blocks, numbers=numbers, block_tokens=1, block_bytes=5000)


def _in_place(folder: Path, text: str) -> None:
    """Writes in place, which is wrong: the harness must detect it."""
    with open(folder / ".scratch", "x") as file:
        file.write(text)
    (folder / "a").write_text(text)
    (folder / "b").write_text(text)
    (folder / ".scratch").unlink()


def _talk(folder: Path, text: str) -> None:
    Conversation(None, text).save(folder / "chat.json")


def _checkpoints_are_whole(folder: Path, old: State, new: State) -> bool:
    """Between two saves: every checkpoint is complete, and one exists if one existed before."""
    result = checkpoints(folder / "run")
    try:
        for checkpoint in result:
            verify(checkpoint)
    except CheckpointError:
        return False
    return bool(result) or not any("checkpoint-" in name for name in old)
