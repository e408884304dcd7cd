"""A directory written over several runs: finished files stay; unfinished files, or files that contradict the journal, do
not."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path

import pytest

from deepseek_optimizer.checkpoint.unfinished import Unfinished
from deepseek_optimizer.errors import CheckpointError
from support.killed import die_at

NAMES = ["a", "b", "c"]
IDENTITY = {"source": [["x", 1]], "settings": {"precision": "int4"}}


def write(directory: Unfinished, name: str) -> None:
    with directory.file(name) as file:
        file.write(name.encode() * 1000)
        file.write(memoryview(b"end"))


def interrupted(target: Path, names: list[str] = NAMES[:2], identity: dict = IDENTITY) -> Path:
    """Runs until it is stopped after these files; returns its temporary directory."""
    with pytest.raises(KeyboardInterrupt), Unfinished(target, identity, NAMES) as directory:
        for name in names:
            write(directory, name)
        raise KeyboardInterrupt
    return directory.path


def resume(target: Path, identity: dict = IDENTITY) -> tuple[set[str], str | None]:
    """Finishes the run; returns the files that existed, and the messages."""
    with Unfinished(target, identity, NAMES) as directory:
        result, news = set(directory.finished), directory.news
        assert result == {p.name for p in directory.folder.iterdir()}
        for name in NAMES:
            if name not in result:
                write(directory, name)
        assert not target.exists()
        directory.publish()
    assert {p.name: p.read_bytes() for p in target.iterdir()} == {n: n.encode() * 1000 + b"end" for n in NAMES}
    assert os.listdir(target.parent) == [target.name]
    return result, news


def test_a_single_run(tmp_path: Path) -> None:
    assert resume(tmp_path / "t") == (set(), None)


def test_resumed(tmp_path: Path) -> None:
    path = interrupted(tmp_path / "t")
    (path / "files" / "c.part").write_bytes(b"half")
    (path / "files" / "stray").mkdir()
    (path / "stray").write_bytes(b"")
    actual, news = resume(tmp_path / "t")
    assert actual == {"a", "b"} and news is not None and "resuming" in news and "2 of 3" in news


def test_another_identity_starts_over(tmp_path: Path) -> None:
    interrupted(tmp_path / "t")
    actual, news = resume(tmp_path / "t", {**IDENTITY, "settings": {"precision": "int8"}})
    assert actual == set() and news is not None and "another settings: starting over" in news


def truncate(path: Path) -> None:
    os.truncate(path / "files" / "a", 500)


def flip(path: Path) -> None:
    data = bytearray((path / "files" / "a").read_bytes())
    data[700] ^= 1
    (path / "files" / "a").write_bytes(data)


def link(path: Path) -> None:
    os.rename(path / "files" / "a", path.parent / "elsewhere")
    (path / "files" / "a").symlink_to(path.parent / "elsewhere")


def edit(path: Path, **change: object) -> None:
    lines = [json.loads(line) for line in (path / "journal.jsonl").read_text().splitlines()]
    lines = [line | change if line.get("file") == "a" else line for line in lines]
    (path / "journal.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.mark.parametrize(
    "damage", [truncate, flip, link, lambda p: edit(p, bytes=7), lambda p: edit(p, sha256="0" * 64), lambda p: edit(p, more=1)]
)
def test_damaged_files_are_rewritten(tmp_path: Path, damage) -> None:
    damage(interrupted(tmp_path / "t"))
    with Unfinished(tmp_path / "t", IDENTITY, NAMES) as directory:
        assert (
            directory.finished == {"b"} and directory.news is not None and "damaged, will be written again: a" in directory.news
        )
        write(directory, "a")
        assert (directory.folder / "a").read_bytes() == b"a" * 1000 + b"end" and not (directory.folder / "a").is_symlink()


@pytest.mark.parametrize(
    "journal",
    [b"", b"\0" * 100, b"[]\n", b'{"identity": 3}\n', b"[" * 100_000, b'{"identity": {}', b'"' + b"x" * 100 + b'"\n', None],
)
def test_a_journal_that_cannot_be_read(tmp_path: Path, journal: bytes | None) -> None:
    path = interrupted(tmp_path / "t") / "journal.jsonl"
    path.unlink()
    if journal is None:
        path.mkdir()
    else:
        path.write_bytes(journal)
    actual, news = resume(tmp_path / "t")
    assert actual == set() and news is not None and "cannot be read: starting over" in news


def test_an_incomplete_last_line(tmp_path: Path) -> None:
    path = interrupted(tmp_path / "t")
    os.truncate(path / "journal.jsonl", (path / "journal.jsonl").stat().st_size - 10)
    actual, _ = resume(tmp_path / "t")
    assert actual == {"a"}


def test_entries_outside_the_directory_are_ignored(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("precious")
    path = interrupted(tmp_path / "t")
    edit(path, file="../../../mine")
    (path / "files" / "out").symlink_to(tmp_path)
    with Unfinished(tmp_path / "t", IDENTITY, NAMES) as directory:
        assert directory.finished == {"b"} and os.listdir(directory.folder) == ["b"]
    assert (tmp_path / "mine").read_text() == "precious"


@pytest.mark.parametrize("kind", ["file", "link"])
def test_another_file_in_its_place(tmp_path: Path, kind: str) -> None:
    place = tmp_path / ".t.unfinished.tmp"
    if kind == "file":
        place.write_text("mine")
    else:
        (tmp_path / "other").mkdir()
        place.symlink_to(tmp_path / "other")
    with pytest.raises(CheckpointError, match="exists where a temporary directory has to be created"):
        Unfinished(tmp_path / "t", IDENTITY, NAMES)
    assert place.is_symlink() or place.read_text() == "mine"


def test_permanent_errors_leave_nothing(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError), Unfinished(tmp_path / "t", IDENTITY, NAMES) as directory:
        write(directory, "a")
        raise CheckpointError("NaN")
    with pytest.raises(KeyboardInterrupt), Unfinished(tmp_path / "t", IDENTITY, NAMES) as directory:
        raise KeyboardInterrupt  # nothing is finished
    assert not list(tmp_path.iterdir())


def test_overwriting(tmp_path: Path) -> None:
    target = tmp_path / "t"
    target.mkdir()
    (target / "old").write_text("old")
    with pytest.raises(CheckpointError, match="exists already"):
        Unfinished(target, IDENTITY, NAMES)
    with Unfinished(target, IDENTITY, NAMES, overwrite=True) as directory:
        write(directory, "a")
        assert (target / "old").exists()
        directory.publish()
    assert os.listdir(target) == ["a"] and os.listdir(tmp_path) == ["t"]


def test_concurrent_runs(tmp_path: Path) -> None:
    with Unfinished(tmp_path / "t", IDENTITY, NAMES) as directory:
        write(directory, "a")
        with pytest.raises(CheckpointError, match="another process"):
            Unfinished(tmp_path / "t", IDENTITY, NAMES)
        assert (directory.folder / "a").exists()


def test_killed_at_every_step(tmp_path: Path) -> None:
    """SIGKILL before the n-th sync, rename or removal, for every n; a second run completes the same directory."""
    finished = set()
    for n in range(100):
        target = tmp_path / str(n) / "t"
        child = os.fork()
        if child == 0:
            try:
                die_at(n, (os, "fsync"), (os, "replace"), (os, "rename"), (shutil, "rmtree"))
                resume(target)
            except BaseException:
                os._exit(1)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if os.WIFEXITED(status):
            assert os.WEXITSTATUS(status) == 0
            break
        assert os.WTERMSIG(status) == signal.SIGKILL
        if target.exists():  # killed during the clean-up: the target is complete anyway
            assert sorted(os.listdir(target)) == NAMES
        else:
            actual, _ = resume(target)
            finished.add(len(actual))
    assert n >= 15 and finished == {0, 1, 2, 3}
